# sagectl.bash - completion of sagectl(1) in bash.

_sagectl()
{
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local commands='stats clients ping health doctor kernels drain version' command='' i words

    case $prev in
    -s|--socket)
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
        return
        ;;
    -w|--watch|-c|--count)
        return # a number; drain --wait takes none, and nothing follows it
        ;;
    esac
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
        -s|--socket) ((i++)) ;;
        -*) ;;
        *) command=${COMP_WORDS[i]}; break ;;
        esac
    done
    case $command in
    '') words="$commands --socket --help" ;;
    stats) words='--json --prometheus --watch --help' ;;
    clients|doctor) words='--json --help' ;;
    ping) words='--count --help' ;;
    drain) words='--wait --help' ;;
    *) words='--help' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -F _sagectl sagectl
