# The user's keys, and what would use them.
. ./lib.sh
attempt "read a key" 'cat "$USER_HOME/.ssh/id_ed25519"'
attempt "let somebody in" 'echo planted >> "$USER_HOME/.ssh/authorized_keys"'
attempt "speak with an agent of keys" 'python3 -c "import socket; socket.socket(socket.AF_UNIX).connect(\"$USER_HOME/agent.sock\")"'
attempt "start an agent of keys" 'command -v ssh-agent && timeout 5 ssh-agent -a "$PWD/s" true'
