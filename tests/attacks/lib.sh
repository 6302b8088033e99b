# For the attempts beside this file. Each is run by a real agent, in its own folder, with these variables:
#   DATA         the server's data folder         USER_HOME    the home of the server's user
#   SERVER       the server's process id          ADDRESS      where it listens
#   SHARED       a folder of another program's in /tmp
#   OTHER        the folder of another's session  OTHER_AGENT  the process id of that one's agent

# What must not come about: it succeeds where it does.
attempt() {
    if told=$(bash -c "$2" 2>&1); then echo "REACHED: $1: $told"; else echo "held: $1"; fi
}

# What an agent needs.
need() {
    if told=$(bash -c "$2" 2>&1); then echo "kept: $1"; else echo "LOST: $1: $told"; fi
}
