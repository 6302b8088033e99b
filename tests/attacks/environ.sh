# What other processes were started with.
. ./lib.sh
attempt "read the server's environment" 'cat "/proc/$SERVER/environ"'
attempt "read its memory" 'head -c 1 "/proc/$SERVER/mem" || readlink "/proc/$SERVER/fd/1" || cat "/proc/$SERVER/maps" || ls "/proc/$SERVER/cwd/" || ls "/proc/$SERVER/root/"'
attempt "read another agent's environment" 'cat "/proc/$OTHER_AGENT/environ"'
attempt "find the operator's token anywhere" 'cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr "\0" "\n" | grep "an-admin-toke[n]"'
attempt "see what others were asked" 'cat /proc/[0-9]*/cmdline 2>/dev/null | tr "\0" "\n" | grep "quince-promp[t]"'
attempt "go round by /proc" 'cat "/proc/self/root$OTHER/diary.txt" || cat /proc/self/cwd/../../clawdforge.db'
