# Other processes, by the calls that reach into them.
. ./lib.sh
call() { echo "python3 -c 'import ctypes, sys; sys.exit(ctypes.CDLL(None).$1 < 0)'"; }
attempt "trace the server" "$(call "ptrace(16, $SERVER, 0, 0)")"
attempt "trace another agent" "$(call "ptrace(16, $OTHER_AGENT, 0, 0)")"
attempt "have the server run out of files" "python3 -c 'import resource; resource.prlimit($SERVER, resource.RLIMIT_NOFILE, (3, 3))'"
attempt "end another agent by its time" "python3 -c 'import resource; resource.prlimit($OTHER_AGENT, resource.RLIMIT_CPU, (0, 0))'"
attempt "slow the server down" "python3 -c 'import os; os.setpriority(os.PRIO_PROCESS, $SERVER, 19)'"
attempt "slow all of the user down" "python3 -c 'import os; os.setpriority(os.PRIO_USER, 0, 19)'"
attempt "bind the server to one processor" "python3 -c 'import os; os.sched_setaffinity($SERVER, [0])'"
attempt "type at the server's terminal" "python3 -c 'import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b\"x\")'"
attempt "have the kernel choose another agent first" 'echo 1000 > "/proc/$OTHER_AGENT/oom_score_adj"'
attempt "end a control group" ': > "$(find /sys/fs/cgroup -name cgroup.procs | head -n 1)"'
attempt "take powers in a namespace of its own" 'unshare --user --map-root-user true'
attempt "join the server's namespaces" "python3 -c 'import ctypes, os, sys; sys.exit(ctypes.CDLL(None).setns(os.pidfd_open($SERVER), 0x40000000) < 0)'"
