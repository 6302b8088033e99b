# More and more on the disk: it is ended.
yes >large
sleep 60
