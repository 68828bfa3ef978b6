#!/bin/sh
# Makes the passwords and the token of docker/compose.yaml and the addresses that contain them, as files in docker/secrets.
#
#   sh docker/make-secrets.sh [FOLDER [HOST [DATABASE]]]
#
# What is there already stays, so that it can be run again. Delete a password file to get another password; the
# initialiser gives it to the user the next time. The root password alone is fixed once the database has started.
set -eu

folder="${1:-$(dirname "$0")/secrets}"
host="${2:-mongo:27017}"
database="${3:-mongotorch}"

# Only you get into the folder. The files are readable for all, because a container has users of its own.
mkdir -p "$folder"
chmod 700 "$folder"
umask 022

for name in root_password reader_password worker_password trainer_password dashboard_token; do
  file="$folder/$name"
  if [ ! -s "$file" ]; then
    # 48 hexadecimal digits: nothing in them has to be escaped in a URI.
    head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$file.new"
    mv "$file.new" "$file"
  fi
done

for user in reader worker trainer; do
  password="$(cat "$folder/${user}_password")"
  printf 'mongodb://%s:%s@%s/%s?authSource=admin&replicaSet=rs0\n' \
    "$user" "$password" "$host" "$database" > "$folder/${user}_uri.new"
  mv "$folder/${user}_uri.new" "$folder/${user}_uri"
done

echo "passwords and addresses are in $folder"
