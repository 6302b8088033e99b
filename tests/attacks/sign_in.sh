# The user's sign-in: it may be used, and neither renewed, ended nor replaced.
. ./lib.sh
attempt "read the sign-in" 'cat "$USER_HOME/.claude/.credentials.json"'
attempt "find what renews it" 'grep -rs refresh-of-the-user "$USER_HOME" "$CLAUDE_CONFIG_DIR" "$HOME" .'
attempt "replace it" 'echo "{}" > "$USER_HOME/.claude/.credentials.json"'
attempt "lock it" 'mkdir "$USER_HOME/.claude.lock" || mkdir "$USER_HOME/.claude/.credentials.json.lock"'
need "a copy that can be used" 'grep -q accessToken "$CLAUDE_CONFIG_DIR/.credentials.json"'
