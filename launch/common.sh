# shellcheck shell=bash
# What the launchers share: flags, quoting, and showing what would be done. Sourced, never run.

say() { printf '==> %s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

declare -A flag=() # what was given as --name=value; a flag without a value is "yes"
train=()           # what follows --: the flags of vit_scaling.train

# read_flags "KNOWN NAMES" ARGUMENTS: fills `flag` and `train`; --help prints the comment at the head of the script.
read_flags() {
  local known=" $1 dry-run help" name
  shift
  while [ $# -gt 0 ]; do
    case $1 in
    --)
      shift
      train=("$@")
      break
      ;;
    --*)
      name=${1#--}
      name=${name%%=*}
      [[ "$known " == *" $name "* ]] || fail "there is no flag --$name; the flags are${known// / --}"
      case $1 in
      *=*) flag[$name]+=${flag[$name]:+$'\n'}${1#*=} ;; # a flag given twice has two lines
      *) flag[$name]=yes ;;
      esac
      ;;
    *) fail "$1 is no flag; flags look like --name=value, and those of the trainer follow --" ;;
    esac
    shift
  done
  if [ -n "${flag[help]:-}" ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
  fi
}

# need NAMES: fails unless all of these flags were given.
need() {
  local name
  for name in "$@"; do
    [[ -n ${flag[$name]:-} ]] || fail "--$name=... is missing; --help tells what it is"
  done
}

# need_config: fails unless the trainer's flags name a config.
need_config() {
  [[ "${train[*]-}" == *--config=* ]] || fail "the trainer's flags must follow --, with --config=FILE at least"
}

# quoted WORDS: prints them as a shell would read them back.
quoted() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/"$quote"}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# run COMMAND: runs it, or with --dry-run prints it.
run() {
  if [ -n "${flag[dry-run]:-}" ]; then quoted "$@"; else "$@"; fi
}
