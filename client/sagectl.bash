# sagectl.bash - completion of sagectl(1) in bash.

_sagectl()
{
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local commands='stats clients top ping health doctor bench kernels drain version' command='' i words=''

    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
        -s|--socket) ((i++)) ;;
        -*) ;;
        *) command=${COMP_WORDS[i]}; break ;;
        esac
    done
    case $command:$prev in
    :-s|:--socket)
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
        return
        ;;
    bench:-e|bench:--dtype) words='f16 bf16' ;;
    bench:-v|bench:--variant) words='auto int8_fp16 int8_fp8' ;;
    stats:-w|stats:--watch|ping:-c|ping:--count|top:-[ic]|top:--interval|top:--count|\
    bench:-[pitbqknmd]|bench:--processes|bench:--depth|bench:--time|bench:--batch|bench:--heads|\
    bench:--kvheads|bench:--tokens|bench:--keys|bench:--dim)
        return # a number
        ;;
    esac
    [ -n "$words" ] || case $command in
    '') words="$commands --socket --help" ;;
    stats) words='--json --prometheus --watch --help' ;;
    clients|doctor) words='--json --help' ;;
    top) words='--interval --count --help' ;;
    bench) words='--processes --depth --time --json --batch --heads --kvheads --tokens --keys --dim
        --dtype --variant --causal --help' ;;
    ping) words='--count --help' ;;
    drain) words='--wait --help' ;;
    *) words='--help' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -F _sagectl sagectl
