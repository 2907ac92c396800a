# Sourced by probes that search. A search passes by the line `contained`, which `verdict` alone says:
# when it came to its own end, and found what was planted for it. One that was cut off, or that does
# not find what is there, comes to no verdict.
set -o pipefail
planted_name=ringfence-planted
# in two parts: this file is searched, too
planted_secret=sk-ant-api0"3"-CANARY_SECRE"T"_0123abcd-$planted_name
planted=$(mktemp -d /tmp/$planted_name.XXXXXX) || exit 9
trap 'rm -rf "$planted"; [ -z "$carrier" ] || kill "$carrier"' EXIT

# everywhere EXPRESSION: find, through every mount but packages and what the kernel makes up. A
# probe that leaves mounts out would not see the one that should not be there.
everywhere() {
  find / \( -path /proc -o -path /sys -o -path /usr \) -prune -o "$@" 2>/dev/null
}

# of_kind TEST: those of the paths on standard input, each ended by NUL, of which it is true. find
# believes the directory, where a mount has the kind of the file beneath it: its -type is blind.
of_kind() {
  while IFS= read -r -d "" file; do
    [ ! -L "$file" ] && test "$1" "$file" && printf "%s\n" "$file"
  done
  return 0
}

# holding PATTERN: those of the files that hold it.
holding() {
  of_kind -f | while IFS= read -r file; do
    grep -qs -- "$1" "$file"
    case $? in 0) printf "%s\n" "$file" ;; 1 | 2) ;; *) return 9 ;; esac
  done
}

# carry: the planted secret stands in the environment of what is started, and in a process's argv.
carry() {
  export PLANTED=$planted_secret
  bash -c 'exec -a "argv-$PLANTED" sleep 300' > /dev/null 2>&1 &
  carrier=$!
  for _ in {1..200}; do
    [[ $(tr "\0" " " 2>/dev/null < /proc/$carrier/cmdline) = argv-$PLANTED* ]] && return
    sleep 0.05
  done
}

# verdict HITS STATUS MOST PLANTED...: MOST is the largest status of a search that came to its end
# (some directories may not be read). Only the shell itself decides: a broken program says nothing.
verdict() {
  local hits=$1 status=$2 most=$3 hit one escaped=
  shift 3
  while IFS= read -r hit; do
    case $hit in "" | *"$planted_name"*) continue ;; esac
    for one; do [ "$hit" != "$one" ] || continue 2; done
    echo "ESCAPED $hit"
    escaped=1
  done <<< "$hits"
  [ -z "$escaped" ] || exit 1
  for one; do
    case $'\n'$hits$'\n' in *$'\n'"$one"$'\n'*) ;; *) echo "what was planted is not found: $one"; exit 9 ;; esac
  done
  [ "$status" -le "$most" ] || { echo "the search was cut off (status $status)"; exit 9; }
  echo "contained: the search found what was planted, and nothing else"
}
