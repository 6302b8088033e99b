# Signals to what is not its own. Needs Linux 6.12.
. ./lib.sh
attempt "end the server" 'kill -9 "$SERVER"'
attempt "stop it" 'kill -STOP "$SERVER"'
attempt "end another agent" 'kill -9 "$OTHER_AGENT"'
attempt "end it by a handle" "python3 -c 'import os, signal; signal.pidfd_send_signal(os.pidfd_open($OTHER_AGENT), 9)'"
need "signals to its own" 'sleep 60 & kill $! && ! wait $!'
