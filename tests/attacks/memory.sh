# More and more memory: all of it is ended.
python3 -c "
kept = []
while True: kept.append(b'x' * 10 ** 7 + bytes(len(kept)))"
sleep 60
