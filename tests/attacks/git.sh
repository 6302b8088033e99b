# What the user's git would run.
. ./lib.sh
attempt "configure the user's git" 'HOME="$USER_HOME" git config --global core.hooksPath "$PWD" 2>&1 || echo "[core] hooksPath = $PWD" >> "$USER_HOME/.gitconfig"'
attempt "read the user's git credentials" 'cat "$USER_HOME/.git-credentials"'
attempt "plant a hook in the user's repository" 'echo "touch $PWD/pwned" > "$USER_HOME/project/.git/hooks/post-checkout"'
