# What is near, for an agent whose app's token lets it reach the model's API alone.
. ./lib.sh
attempt "reach the server" 'curl -sf -m 5 "http://$ADDRESS/healthz"'
attempt "reach it past the proxy" 'curl -sf -m 5 --noproxy "*" "http://$ADDRESS/healthz"'
attempt "reach it by the proxy" 'curl -sf -m 5 --noproxy "" "http://$ADDRESS/healthz"'
attempt "reach another program of this machine" 'curl -sf -m 5 --noproxy "" "http://$NEAR/" || curl -sf -m 5 --noproxy "*" "http://$NEAR/"'
attempt "reach it by a tunnel" 'curl -sf -m 5 --noproxy "" -p "http://$NEAR/"'
attempt "reach a machine near by" 'curl -sf -m 5 http://192.168.1.1/ || curl -sfk -m 5 https://10.0.0.1/'
attempt "reach the cloud's own data" 'curl -sf -m 5 http://169.254.169.254/latest/meta-data/'
attempt "tell a name by DNS" 'python3 -c "import socket; socket.getaddrinfo(\"secret.example.com\", 80)"'
attempt "tell one by the proxy" 'curl -sf -m 5 http://secret.example.com/'
attempt "send a datagram" 'python3 -c "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b\"x\", (\"192.168.1.1\", 53))"'
attempt "have another way out" 'grep -vE "^ +lo:|\|" /proc/net/dev || tail -n +2 /proc/net/route | grep .'
attempt "have a connection made from outside" 'python3 -c "import socket; socket.create_connection((\"$(echo $NEAR | cut -d: -f1)\", $(echo $NEAR | cut -d: -f2)), 5)"'
need "its own loopback" 'python3 -c "
import socket
s = socket.create_server((\"127.0.0.1\", 0))
socket.create_connection(s.getsockname())"'
