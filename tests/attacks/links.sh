# Links in the way of what the server does in its folder: copies, removals, hand-outs.
. ./lib.sh
attempt "follow a link out" 'ln -s "$OTHER/diary.txt" link; cat link'
attempt "hold what is another's by a second name" 'ln "$OTHER/diary.txt" hard'
attempt "move it here" 'mv "$OTHER/diary.txt" moved'
attempt "hold the ledger by a second name" 'ln "$DATA/clawdforge.db" ledger'
# Left for the server to fall over when it takes the folder away, or puts a file into it.
need "links of its own" 'ln -s "$USER_HOME" home; ln -s "$OTHER" other; ln -s / root; mkdir deep && ln -s ../.. deep/up'
# The sign-in is handed out anew meanwhile.
need "links where copies go" 'cd "$CLAUDE_CONFIG_DIR" && mv .credentials.json kept && ln -s "$USER_HOME/.bashrc" .credentials.json &&
    sleep 5 && mv -f kept .credentials.json'
need "a link for all of its own files" 'cd "$CLAUDE_CONFIG_DIR/.." && config=$(basename "$CLAUDE_CONFIG_DIR") && { ! mv "$config" kept || { ln -s "$USER_HOME" "$config" && sleep 5 && rm "$config" &&
    mv kept "$config"; }; }'
need "to swap a folder for a link all the time" '(end=$((SECONDS + 2)); while [ $SECONDS -lt $end ]; do mkdir -p swap/in && echo x > swap/in/x && mv swap s && ln -s "$USER_HOME" swap && rm swap && rm -rf s; done)'
