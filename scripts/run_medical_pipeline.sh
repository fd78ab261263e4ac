#!/usr/bin/env bash
# Organ meshes in one command: looks at the data, trains in full and with LoRA, evaluates, compares.
#
#     scripts/run_medical_pipeline.sh                                    # the demo, without any download
#     scripts/run_medical_pipeline.sh --method lora --data_dir ~/Task04_Hippocampus --model demo --epochs 20
#     scripts/run_medical_pipeline.sh --data_dir ~/masks --organs liver,spleen --lora_r 8 --split test
#
# --method full, lora or both (the default). Every other setting goes to each step that has one of this name: preprocess.py,
# train.py and train_lora.py, eval.py; their --help says which there are. One that no step has is refused before anything
# starts. --output_dir is that of training; reports are in the run's folder. Data of your own is trained on as preprocess.py leaves
# it, so that its settings, such as whose scan is whose (--group), hold. PYTHON names the interpreter: python if it is not set.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
method=both
settings=() # name, value, name, value ...
none=$'\a' # the value of a switch

fail() {
    echo "error: $1" >&2
    exit 2
}

# The settings of a script: "name" where it takes a value, "name!" where it is a switch.
settings_of() {
    "$python" "$root/medical_sam3d/$1" --help | sed -nE -e 's/^  --([a-z0-9_]+), --no_.*/\1!/p' -e 's/^  --([a-z0-9_]+) .*/\1/p'
}

while (($#)); do
    name=${1#--} value=$none
    case $1 in
        -h | --help) sed -nE '2,/^set/{/^set/d;s/^# ?//p}' "${BASH_SOURCE[0]}" && exit ;;
        --*=*) name=${name%%=*} value=${1#*=} ;;
        --*) if (($# > 1)) && [[ $2 != --* ]]; then value=$2 && shift; fi ;;
        *) fail "$1: settings are --name value" ;;
    esac
    shift
    name=${name//-/_}
    if [[ $name == method ]]; then method=$value; else settings+=("$name" "$value"); fi
done
case $method in
    full) pairs="train.py:eval.py" ;;
    lora) pairs="train_lora.py:eval_lora.py" ;;
    both) pairs="train.py:eval.py train_lora.py:eval_lora.py" ;;
    *) fail "--method ${method#"$none"}: full, lora or both" ;;
esac

aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
for script in preprocess.py ${pairs//:/ }; do settings_of "$script" >"$aside/$script"; done
for ((i = 0; i < ${#settings[@]}; i += 2)); do
    name=${settings[i]} value=${settings[i + 1]}
    if grep -qxhF -e "${name#no_}!" "$aside"/*.py; then
        [[ $value == "$none" ]] || fail "--$name $value: it is a switch, which takes no value"
    elif grep -qxhF -e "$name" "$aside"/*.py; then
        [[ $value != "$none" ]] || fail "--$name needs a value"
    else
        fail "--$name: no step has a setting of this name"
    fi
done

# Runs a script with those of the settings that it has, but for the names in $2, and with the arguments from $3 on.
run() {
    local script=$1 except=" $2 " arguments=() i name
    for ((i = 0; i < ${#settings[@]}; i += 2)); do
        name=${settings[i]}
        if [[ $except == *" $name "* ]]; then
            continue
        elif grep -qxF -e "${name#no_}!" "$aside/$script"; then
            arguments+=("--$name")
        elif grep -qxF -e "$name" "$aside/$script"; then
            arguments+=("--$name" "${settings[i + 1]}")
        fi
    done
    shift 2
    arguments+=("$@")
    echo "== $script ${arguments[*]-}"
    PYTHONUNBUFFERED=1 "$python" "$root/medical_sam3d/$script" ${arguments[@]+"${arguments[@]}"}
}

run preprocess.py "output_dir model" | tee "$aside/log"
data=() # the demo's is found without a name
for ((i = 0; i < ${#settings[@]}; i += 2)); do
    if [[ ${settings[i]} == data_dir && -n ${settings[i + 1]} ]]; then
        data=(--data_dir "$(sed -n 's/.* ready: python train_lora.py --data_dir //p' "$aside/log" | tail -n 1)")
        [[ -n ${data[1]} ]] || fail "preprocess.py does not say where the prepared organs are"
    fi
done
folders=()
for pair in $pairs; do
    run "${pair%:*}" "data_dir" ${data[@]+"${data[@]}"} | tee "$aside/log"
    folder=$(sed -n 's/^run folder //p' "$aside/log" | tail -n 1)
    folders+=("$folder")
    run "${pair#*:}" "output_dir data_dir" --checkpoint "$folder/checkpoints/best"
done
if [[ $method == both ]]; then
    echo "== compare.py"
    "$python" "$root/scripts/compare.py" "${folders[@]}"
fi
