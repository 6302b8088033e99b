# The mark by which the server knows what belongs to which run.
. ./lib.sh
need "to have no mark" '(env -i setsid sleep 633 >/dev/null 2>&1 &)'
need "to have another's mark" '(AGENT_RUN="${AGENT_RUN%/*}/00000000000000000000000000000000" setsid sleep 633 >/dev/null 2>&1 &)'
need "to have the mark of another server" '(AGENT_RUN=1-1/x setsid sleep 633 >/dev/null 2>&1 &)'
attempt "become the server's own agent again, unbound" 'AGENT_CONFINE="--" "/proc/$SERVER/exe" --version'
