# What the user's shells would run.
. ./lib.sh
for place in .bashrc .profile .bash_profile .zshrc .config/fish/config.fish .local/bin/ls; do
    attempt "write $place" "echo 'touch $PWD/pwned' >> '$USER_HOME/$place'"
    attempt "read $place" "cat '$USER_HOME/$place'"
done
