# Others by whom it could have something done.
. ./lib.sh
attempt "make a Unix socket" 'python3 -c "import socket; socket.socket(socket.AF_UNIX)"'
attempt "make a datagram pair, which can be turned on others" 'python3 -c "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"'
attempt "speak with who listens on an abstract one" 'python3 -c "import socket; socket.socket(socket.AF_UNIX).connect(\"\\0victim-of-attacks\")"'
attempt "speak with the server's proxy" 'python3 -c "import socket; socket.socket(socket.AF_UNIX).connect(\"$DATA/network.sock\")"'
attempt "speak with Docker" 'curl -sf -m 5 --unix-socket /var/run/docker.sock http://x/info'
need "pairs of sockets, as pipes" 'python3 -c "import socket; socket.socketpair()"'
