# What another app's claude would remember.
. ./lib.sh
attempt "write a memory for the user" 'mkdir -p "$USER_HOME/.claude/projects/x/memory" && echo planted > "$USER_HOME/.claude/projects/x/memory/MEMORY.md"'
attempt "write a memory for another app" 'mkdir -p "$DATA/memories/other" && echo planted > "$DATA/memories/other/MEMORY.md"'
attempt "read another app's memories" 'cat "$DATA"/memories/*/*'
