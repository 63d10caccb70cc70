# shellcheck shell=bash
# What the launchers share: flags, quoting, dry runs, restarts, and when a run is finished. Sourced, never run.

say() { printf '==> %s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

declare -A flag=() # what was given as --name=value; a flag without a value is "yes"
given=()           # the names of the flags, in order
train=()           # what follows --: the flags of the trainer

# read_flags "KNOWN NAMES" ARGUMENTS: fills `flag` and `train`; a known name of "*" allows any. --help prints the comment
# at the head of the script.
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
      [[ "$known " == *" $name "* || "$known " == *" * "* ]] || fail "there is no flag --$name; the flags are${known// / --}"
      [[ -n "${flag[$name]:-}" ]] || given+=("$name")
      case $1 in
      *=*) flag[$name]+=${flag[$name]:+$'\n'}${1#*=} ;; # a flag given twice has two lines
      *) flag[$name]=yes ;;
      esac
      ;;
    *) fail "$1 is not a flag; flags look like --name=value, and those of the trainer follow --" ;;
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
    [[ -n ${flag[$name]:-} ]] || fail "--$name=... is missing; --help says what it is"
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

# finished WORKDIR: prints a shell command that succeeds if there are a result and the checkpoint that it names.
finished() {
  if [[ $1 == gs://* ]]; then
    local code='import json, sys; from vit_scaling import paths; found = paths.place(sys.argv[1]) / "result.json"; '
    code+='sys.exit(not (found.exists() and paths.place(json.loads(found.read_text())["checkpoint"]).is_dir()))'
    # shellcheck disable=SC2016 # the shell that runs the command expands it
    printf '"$(if test -x .venv/bin/python; then echo .venv/bin/python; else echo python; fi)" %s\n' "$(quoted -c "$code" "$1")"
    return
  fi
  # shellcheck disable=SC2016 # the shell that runs the command expands it
  printf 'checkpoint=$(sed -n '\''s/^ *"checkpoint": "\\(.*\\)",\\{0,1\\}$/\\1/p'\'' %s 2>/dev/null) && test -n "$checkpoint" && test -d "$checkpoint"\n' \
    "$(quoted "$1/result.json")"
}

# pause_after SECONDS: waits before the next attempt, given how long the last one lasted: 10 s, twice as long after each
# attempt of under 10 minutes, and 2 minutes at most, which the hosts of one run wait for each other. Fails after 10 such
# attempts in a row.
short_attempts=0
pause_after() {
  local pause=10 count
  if [ "$1" -ge 600 ]; then short_attempts=0; else short_attempts=$((short_attempts + 1)); fi
  [ "$short_attempts" -lt 10 ] || return 1
  for ((count = 1; count < short_attempts && pause < 120; count++)); do pause=$((pause * 2)); done
  [ "$pause" -le 120 ] || pause=120
  say "the next attempt begins in $pause s"
  sleep "$pause"
}
