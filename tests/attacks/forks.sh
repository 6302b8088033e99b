# Very many processes that leave their parent: none may be left.
. ./lib.sh
need "to start many" 'for at in $(seq 200); do (setsid sleep 633 >/dev/null 2>&1 &); done'
