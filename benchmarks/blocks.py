"""What stands between the markers of the documents: each block is made from measured results, recipe or code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS
from skipvision.config import ConfigError, ModelConfig
from skipvision.data.kinds import KINDS
from skipvision.data.names import COLOURS, SHAPES
from skipvision.families import FAMILIES
from skipvision.known_models import KNOWN_MODELS
from skipvision.layout import ImageSpan
from skipvision.presets import PRESETS, Setting
from skipvision.training.recipes import read_scratch_recipe

_RECIPE = Path(__file__).parents[1] / "recipes" / "skipvision-tiny.toml"
_TASKS = {
    "what": "what is this",
    "colour": "which colour",
    "count": "how many",
    "where": "where",
    "presence": "is there",
    "read": "what does it say",
    "describe": "describe",
}
_SPLITS = {
    "test": "unseen compositions",
    "test_style": "unseen drawing style",
    "test_font": "unseen fonts",
    "test_photo": "unseen photographs",
}
_TWINS = {
    "skip": "skipping",
    "skip-half": "skipping, half as many retained",
    "dense": "dense",
    "random-drop": "random drop",
    "blind": "blind",
}
_STAGES = {"vision": "vision", "prefill": "prefill", "first_token": "first token", "decode_token": "decode, one token"}

_EXPORT_STAGES = {
    "writing the weights": "weights",
    "writing the graphs": "graphs",
    "checking the graphs against PyTorch": "check",
}


class NotMeasuredError(ValueError):
    """A result that no script has written yet."""


@lru_cache
def result(name: str) -> Any:
    """The results of one script. Raises NotMeasuredError where it was not run."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise NotMeasuredError(f"benchmarks/results/{name}.json is missing: run `python -m benchmarks.{name}`")
    return json.loads(path.read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns are words, and the others are numbers, to the right."""
    lines = [header, ["---"] * texts + ["--:"] * (len(header) - texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def seconds(value: float) -> str:
    """With three figures, in the unit that reads best."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.3g} MiB"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB"


def on_machine(found: Any) -> str:
    """Where and when something was measured."""
    machine, versions = found["machine"], found["versions"]
    tools = ", ".join(f"{name} {versions[name]}" for name in ("onnxruntime", "torch") if name in versions)
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return f"{machine['cpu']}, {threads}, {tools}, {found['date']}"


def accuracy() -> str:
    """The shipped model, per task and split."""
    found = result("accuracy")
    splits = {name: found["splits"][name] for name in _SPLITS}
    easy = found["splits"]["easy_vqa"]
    rows = [
        [title, *(percent(each["tasks"][task]["share"]) if task in each["tasks"] else "" for each in splits.values())]
        for task, title in _TASKS.items()
    ]
    rows += [
        ["**mean over tasks**", *(f"**{percent(each['mean_over_tasks'])}**" for each in splits.values())],
        ["all questions", *(percent(each["share"]) for each in splits.values())],
        ["number of questions", *(f"{each['questions']:,}" for each in splits.values())],
    ]
    return (
        table(["", *_SPLITS.values()], rows)
        + f"\n\nOfficial test questions of easy-VQA: **{percent(easy['share'])}** of {easy['questions']:,} right."
        + f" Answers are those of the bundle, greedy, {found['engine']} {found['precision']}, {found['date']}."
    )


def twins() -> str:
    """The variants at one short, equal budget."""
    found = result("twins")
    measured = {name: found["twins"][name] for name in _TWINS if name in found["twins"]}
    budgets = {(each["steps"], each["questions"]) for each in measured.values()}
    if len(budgets) != 1:
        raise NotMeasuredError("the twins were not trained at one budget: run `python -m benchmarks.twins` for all")
    ((steps, questions),) = budgets
    shares = {name: each["accuracy"] for name, each in measured.items()}
    rows = [
        [title, *(percent(share[task]) if task in share else "" for share in shares.values())]
        for task, title in _TASKS.items()
    ]
    rows.append(["**mean over tasks**", *(f"**{percent(share['all'])}**" for share in shares.values())])
    text = table(["", *(_TWINS[name] for name in measured)], rows)
    text += f"\n\n{steps:,} steps each, same pictures and seed; {questions:,} questions about unseen compositions."
    if not {"skip", "dense"} <= shares.keys():
        return text
    points = 100 * (shares["skip"]["all"] - shares["dense"]["all"])
    return text + f" Skipping is {abs(points):.1f} points {'above' if points > 0 else 'below'} dense."


def speed() -> str:
    """Dense against skipped in ONNX Runtime."""
    found = result("speed")
    cache, flops, chat = found["kv_cache"], found["flops"], found["chat"]
    rows = [
        _compared(title, found["onnxruntime"][stage], seconds, flops.get(stage, {}).get("ratio"))
        for stage, title in _STAGES.items()
    ]
    kept = {name: cache[name]["bytes"] for name in ("dense", "skipped")}
    rows += [
        ["KV cache of the answer", *map(mebibytes, kept.values()), f"{kept['skipped'] / kept['dense']:.2f}", "", ""],
        _compared("opening the graphs", found["session_load"], seconds, None),
        _compared("a whole `svcli chat`", chat["seconds"], seconds, None),
        _compared("its peak memory", chat["peak_bytes"], mebibytes, None),
    ]
    fall = flops["prefill_fall"]
    return (
        table(["", "dense", "skipped", "ratio", "95 %", "FLOPs ratio"], rows)
        + f"\n\nMedians of alternating runs with the same weights, {found['precision']}; {on_machine(found)}."
        + f" In prefill, FLOPs fall by {percent(fall['flops'])} and time by"
        + f" {percent(fall['onnxruntime']['time'])}: {fall['onnxruntime']['quotient']:.2f} of that."
    )


def _compared(title: str, row: Any, unit: Callable[[float], str], flops: float | None) -> list[str]:
    found = row["ratio"]
    return [
        title,
        unit(row["dense"]["median"]),
        unit(row["skipped"]["median"]),
        f"{found['ratio']:.2f}",
        f"{found['low']:.2f} to {found['high']:.2f}",
        "" if flops is None else f"{flops:.2f}",
    ]


def engines() -> str:
    """ONNX Runtime against PyTorch."""
    found = result("speed")
    columns = [(runner, name) for runner in ("torch", "onnxruntime") for name in ("dense", "skipped")]
    titles = {"torch": "PyTorch fp32", "onnxruntime": f"ONNX Runtime {found['precision']}"}
    rows = [
        [title, *(seconds(found[runner][stage][name]["median"]) for runner, name in columns)]
        for stage, title in _STAGES.items()
    ]
    header = ["", *(f"{titles[runner]}, {name}" for runner, name in columns)]
    return table(header, rows) + f"\n\nMedians, the four in turn; {on_machine(found)}."


def start() -> str:
    """Whole processes."""
    found = result("speed")
    chat = found["chat"]
    help_time, chat_time = found["help"]["seconds"]["median"], chat["seconds"]["skipped"]["median"]
    return (
        f"`svcli --help` takes {seconds(help_time)}. A whole `svcli chat`, from the start of the process to its end,"
        f" takes {seconds(chat_time)} for an answer of {chat['answer_tokens']['skipped']} tokens, and at most"
        f" {mebibytes(chat['peak_bytes']['skipped']['median'])} of memory ({on_machine(found)})."
    )


def training_time() -> str:
    """A step dense against skipped, and the run that made the shipped model."""
    found = result("training_time")
    recipe, encoding, share = found["recipe"], found["encoding"], found["ffn_share"]
    step, flops = found["step"], found["flops_per_picture"]
    pictures = recipe["scenes"] + recipe["easy_vqa"]
    text = (
        table(
            ["", "dense", "skipped", "ratio", "95 %", "FLOPs ratio"],
            [_compared(f"a step of {recipe['batch_size']} pictures", step, seconds, flops["ratio"])],
        )
        + f"\n\nForward, backward and update in {recipe['dtype']}, alternating; {on_machine(found)}."
        + f" The FFN has {percent(share['of_layer_weights'])} of a decoder layer's weights (LLaMA-3-8B: 80.8 %) and"
        + f" {percent(share['of_decoder_flops'])} of the dense decoder's FLOPs at this length."
        + f" Composing and encoding {pictures:,} pictures at {encoding['pictures_per_second']:.3g} a second takes"
        + f" {pictures / encoding['pictures_per_second'] / 60:.0f} minutes, once."
    )
    if "run" not in found:
        return text
    return (
        text + f" The {found['run']['steps']:,} steps of the shipped model took {found['run']['minutes']:.0f} minutes."
    )


_PASSES = ("forward", "backward")


def training_ratio() -> str:
    """A step at the paper's settings, dense against skipped."""
    found = result("training_ratio")
    rows = []
    for name, case in found.items():
        setting, step, flops = PRESETS[name], case["step"], case["flops"]
        interval = step["ratio"]
        rows.append(
            [
                f"{setting.title}, {setting.num_retained} + {setting.num_skipped} of {setting.num_tokens:,}",
                str(case["batch_size"]),
                *(seconds(step[kind]["median"]) for kind in ("dense", "skipped")),
                f"{interval['ratio']:.2f}",
                f"{interval['low']:.2f} to {interval['high']:.2f}",
                *(f"{flops[shape]['ratio']:.2f}" for shape in ("measured", "llama-3-8b")),
                f"{case['fall']['quotient']:.2f}",
                "" if setting.printed.hours is None else f"{setting.printed.hours:.2f}",
            ]
        )
    header = ["retained + skipped", "batch", "dense", "skipped", "ratio", "95 %", "FLOPs ratio", "of LLaMA-3-8B"]
    header += ["time saved by FLOPs saved", "the paper's hours"]
    first = next(iter(found.values()))
    text = first["decoder"]
    return (
        f"{table(header, rows)}\n\nA step is forward, backward and AdamW's update in {first['dtype']}, visual rows"
        f" included, medians of alternating steps; {on_machine(first)}. The decoder: {text['num_layers']} layers of"
        f" {text['hidden_size']:,}, FFN {text['intermediate_size']:,}, {text['num_heads']} heads of {text['head_dim']},"
        f" {text['num_kv_heads']} KV heads, random weights."
    )


def training_work() -> str:
    """What the time of such a step is spent on, and what it keeps."""
    rows = []
    for name, case in result("training_ratio").items():
        spent = [{kind: case[stage][kind]["median"] for kind in ("dense", "skipped")} for stage in _PASSES]
        work = case["work"]
        spent += [{kind: work[kind][what] for kind in work} for what in ("matmul", "attention")]
        spent.append({kind: sum(work[kind][what] for what in ("copies", "optimiser", "rest")) for kind in work})
        others = {kind: each["to_baseline"]["ratio"] for kind, each in case["others"].items()}
        rows.append(
            [
                f"`{name}`",
                *(f"{seconds(each['dense'])} -> {seconds(each['skipped'])}" for each in spent),
                percent(case["split"]["median"] / case["step"]["skipped"]["median"]),
                " -> ".join(gibibytes(case["saved_bytes"][kind]) for kind in ("dense", "skipped")),
                f"{others['masked'] if case['baseline'] == 'causal' else 1 / others['causal']:.2f}",
                f"{others['image']:.2f}",
            ]
        )
    header = ["dense -> skipped", *_PASSES, "matrix products", "attention", "all else", "select and merge, of a step"]
    header += ["kept for backward", "plain: mask to causal kernel", "ratio with visibility `image`"]
    return table(header, rows)


def serving() -> str:
    """Many callers of a server, dense against skipped in the same memory."""
    found = result("serving")["load"]
    rows = []
    for clients, case in found["clients"].items():
        for variant in ("dense", "skipped"):
            told = case[variant]
            first, whole = told["first_token"], told["whole"]
            rows.append(
                [
                    f"{clients}, {variant}",
                    str(told["answers"]),
                    f"{told['answers_per_second']:.1f}",
                    f"{told['tokens_per_second']:.0f}",
                    *(seconds(first[each]) for each in ("p50", "p95", "p99")),
                    *(seconds(whole[each]) for each in ("p50", "p95", "p99")),
                    f"{case['tokens_ratio']:.2f}" if variant == "skipped" else "",
                ]
            )
    header = ["callers", "answers", "answers/s", "tokens/s", "first token, p50", "p95", "p99"]
    header += ["whole answer, p50", "p95", "p99", "tokens/s to dense"]
    slots, room = found["slots"], found["rows"]
    return (
        f"{table(header, rows)}\n\nBoth have {found['budget_mib']:g} MiB for KV caches, which is {slots['dense']}"
        f" slots of {room['dense']} rows dense and {slots['skipped']} of {room['skipped']} skipped: as many"
        f" conversations at a time. Answers of {found['tokens']} tokens about pictures not seen before; callers"
        " on the same machine;"
        f" {found['rounds']} rounds of {found['seconds']:g} s each, in turn; {on_machine(found)}."
    )


def soak() -> str:
    """A server through minutes of load."""
    found = result("serving").get("soak")
    if found is None:
        raise NotMeasuredError("nothing was soaked: run `python -m benchmarks.serving` with `--soak 30`")
    memory = found["memory_mib"]
    rows = [["resident memory", *(f"{each:.0f} MiB" for each in memory)]]
    header = ["", *(f"{number} fifth" for number in ("first", "second", "third", "fourth", "last"))]
    change = memory[-1] / memory[1] - 1
    return (
        f"{table(header, rows)}\n\n{found['minutes']:.0f} minutes, 8 callers, {found['answers']:,} answers"
        f" about pictures not seen before, {found['refused']} refused; medians. From the"
        f" second fifth to the last memory {'grows' if change > 0 else 'falls'} by {percent(abs(change))};"
        f" {on_machine(found)}."
    )


def faults() -> str:
    """A server that is treated badly."""
    found = result("server_faults")
    told: dict[str, Callable[[Any], str]] = {
        "malformed": lambda part: f"{part['requests']:,} malformed requests",
        "garbage": lambda part: f"{part['connections']:,} connections with bytes that are no HTTP",
        "hang_ups": lambda part: f"{part['connections']:,} clients that go away at any byte",
        "slow_readers": lambda part: f"{part['readers']} readers who do not read",
    }
    rows = [["before", "", *_size(found["size"]["before"])]]
    for name, said in told.items():
        part = found[name]
        statuses = ", ".join(f"{count:,} times {status}" for status, count in part.get("statuses", {}).items())
        rows.append([said(part), statuses, *_size(part["size"])])
    header = ["behind", "answered with", "resident memory", "threads", "open files"]
    ends = [
        f"{name} under load: {_heard(found[name])}, exit code {found[name]['exit_code']}"
        for name in ("SIGTERM", "SIGKILL")
    ]
    return (
        f"{table(header, rows)}\n\n{'. '.join(ends)}. The same question has the same answer behind each part;"
        f" {on_machine(found['surroundings'])}."
    )


def _size(size: Any) -> list[str]:
    return [mebibytes(size["bytes"]), str(size["threads"]), str(size["files"])]


def _heard(part: Any) -> str:
    said = {"ended": "had their answer to its end", "APIConnectionError": "were told that the connection broke"}
    heard = ", ".join(f"{count} {said.get(what, what)}" for what, count in part["heard"].items())
    return f"of {part['clients']} clients {heard}"


def selection() -> str:
    """Whether what is retained is what matters."""
    found = result("accuracy").get("selection")
    if found is None:
        raise NotMeasuredError("nothing was selected: run `python -m benchmarks.accuracy` with --selection")
    titles = {"covered": "patches that show a thing", "glyph": "patches that show a letter or digit"}
    rows = [
        [title, percent(found[name]["recall"]), percent(found["random"]), percent(found[name]["best"])]
        for name, title in titles.items()
    ]
    header = ["retained, of all", "by CLS attention", "by chance", "at best"]
    return table(header, rows) + f"\n\n{found['pictures']:,} pictures of unseen compositions."


def kernels() -> str:
    """The plugins' kernels beside a copy."""
    found = result("gpu_check")
    if not found.get("cases"):
        raise NotMeasuredError("no kernel was measured: run `python -m benchmarks.gpu_check`")
    rows = []
    for case in found["cases"]:
        shape = "x".join(map(str, case["data" if "data" in case else "tokens"]))
        what = f"{case['taken']} rows of {shape}" if "taken" in case else shape
        moved, share = case["gigabytes_per_second"], case["share_of_copy"]
        rows.append([f"{case['op']} {case['dtype']}, {what}", f"{case['microseconds']['median']:.3g} us"])
        rows[-1] += [f"{moved['kernel']:,.0f} GB/s", "" if share is None else percent(share["ratio"])]
    header = ["kernel", "time", "bandwidth", "of a copy's"]
    right = found["checked"] - len(found["wrong"])
    return (
        table(header, rows)
        + f"\n\n{right:,} of {found['checked']:,} cases answered as PyTorch does. The smallest launch takes"
        + f" {found['launch_floor_microseconds']['median']:.3g} us; a share is given where the copy takes more than ten"
        + f" times that. {_on_gpu(found)}"
    )


def gpu_engine() -> str:
    """PyTorch's engine on a GPU, dense against skipped."""
    found = result("gpu_engine")
    titles = {"vision": "vision", "prefill": "prefill", "decode_token": "decode, one token"}
    rows = []
    for stage, title in titles.items():
        figures = found["stages"][stage]
        share = figures["ratio"]
        rows.append([title, *(seconds(figures[name]["median"]) for name in ("dense", "skipped"))])
        rows[-1] += [f"{share['ratio']:.2f}", f"{share['low']:.2f} to {share['high']:.2f}"]
    return (
        table(["", "dense", "skipped", "ratio", "95 %"], rows)
        + f"\n\nThe bundled model, {found['precision']}, decoding compiled and as a captured graph; answers agree with"
        + f" the CPU's in {len(found['checks'])} modes. {_on_gpu(found)}"
    )


def gpu() -> str:
    """7B models, dense against skipped."""
    found = result("gpu_speed")
    rows = []
    for case in found["cases"]:
        name = f"{case['model']}, {case['setting']}, batch {case['batch']}{', compiled' if case['compiled'] else ''}"
        kept = case["kv_bytes"]
        cells = [_gpu_cell(case[stage]) for stage in ("vision", "prefill", "decode_token")]
        rows.append([name, *cells, " -> ".join(mebibytes(kept[each]) for each in ("dense", "skipped"))])
    limits = found["matmul_flops_per_second"] / 1e12, found["copy_bytes_per_second"] / 1e12
    return (
        table(["", "vision", "prefill", "decode, one token", "KV cache"], rows)
        + "\n\nDense -> skipped, bf16, medians of alternating runs, in brackets how often the roofline the skipped one"
        + f" takes: {limits[0]:.0f} TFLOP/s of a matrix product and {limits[1]:.2f} TB/s of a copy, measured in the"
        + f" same run; behind the bar transformers {found['transformers'] or '(not installed)'}, dense."
        + f" {_on_gpu(found)}"
    )


def _gpu_cell(stage: Any) -> str:
    if "out_of_memory" in stage:
        return "out of memory"
    if "failed" in stage:
        return "failed"
    times = {name: seconds(each["median"]) for name, each in stage["seconds"].items()}
    cell = f"{times['dense']} -> {times['skipped']} ({stage['times_roofline']['skipped']:.2f})"
    return f"{cell} \\| {times['transformers']}" if "transformers" in times else cell


def _on_gpu(found: Any) -> str:
    return f"{found['gpu']}, torch {found['versions']['torch']}, {found['date']}."


_TEXT_ENGINES = {
    "ours": "ours",
    "ours_torch": "ours in PyTorch",
    "transformers": "transformers",
    "genai": "onnxruntime-genai",
    "llama_cpp": "llama.cpp",
}


def smollm2() -> str:
    """Plain text, beside other engines: how fast."""
    found = result("smollm2")["speed"]
    rows = []
    for precision, engines in found["decode"].items():
        for name, row in engines.items():
            cells = []
            for each in (row, found["prefill"][precision][name]):
                times = each.get("ours_times")
                cells.append(f"{each['median']:.0f} ({each['p10']:.0f} to {each['p90']:.0f})")
                cells.append(f"{times['ratio']:.2f} ({times['low']:.2f} to {times['high']:.2f})" if times else "")
            rows.append([f"{precision}, {_TEXT_ENGINES[name]}", *cells])
    versions = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("transformers", "onnxruntime-genai", "llama-cpp-python")
    )
    return (
        table(["", "decode, tokens/s", "ours to it", "prefill, tokens/s", "ours to it"], rows)
        + "\n\nMedians of alternating rounds, with the 10th and 90th percentile; above 1 ours is faster,"
        + f" with its 95 % interval. {found['decode']['fp32']['ours']['runs']} rounds; {on_machine(found)},"
        + f" {versions}."
    )


def smollm2_texts() -> str:
    """The same, and whether they say the same."""
    found = result("smollm2").get("texts")
    if found is None:
        raise NotMeasuredError("the texts are missing: run `python -m benchmarks.smollm2` with `--part texts`")
    rows = [
        [
            f"{each['precision']}, {_TEXT_ENGINES[each['engine']]}",
            f"{each['equal']} of {found['prompts']}",
            f"{each['same_tokens']:.1f}",
        ]
        for each in found["engines"]
    ]
    return (
        table(["", "equal texts", "tokens before the first other one"], rows)
        + f"\n\n{found['prompts']} prompts, {found['tokens']} greedy tokens each, held against transformers in fp32."
        + f" There the best logit is never less than {found['smallest_gap']:.2g} above the next."
    )


def families() -> str:
    """What is known of the models that people have, a row for each family."""
    rows = []
    for family in dict.fromkeys(FAMILIES.values()):
        kinds = ", ".join(f"`{kind}`" for kind, each in FAMILIES.items() if each is family)
        models = {name: known for name, known in KNOWN_MODELS.items() if known.family is family}
        # What LLaVA's own code saves is LLaVA-1.5 under other names.
        config = next(iter(models.values()), KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"]).config
        fitting = [f"`{name}`" for name, setting in PRESETS.items() if _fits(setting, config)]
        ranked = f"`{config.skip_of(1, 1).selector}`"
        names = ", ".join(name.rpartition("/")[2] for name in models)
        rows.append([family.name, kinds, family.sees, ranked, ", ".join(fitting) or "none", names or "none"])
    return table(["family", "`model_type`", "a picture is seen", "ranked by", "presets", "known by name"], rows)


def _fits(setting: Setting, config: ModelConfig) -> bool:
    with suppress(ConfigError):
        replace(config, skip=setting.skip_config(config))
        return True
    return False


def loading() -> str:
    """A published checkpoint of real size."""
    found = result("loading")
    gib = {name: f"{found[name] / 2**30:.1f} GiB" for name in ("loaded_bytes", "read_bytes")}
    return (
        f"A checkpoint in the shape of {found['model']}, {found['parameters']:,} weights in fp16, takes"
        f" {seconds(found['load_seconds'])} to load. The process then has {gib['loaded_bytes']} of memory at most, and"
        f" {gib['read_bytes']} once every weight has been read ({on_machine(found)})."
    )


def profile() -> str:
    """What Skip-FFN rests on, layer by layer."""
    found = result("profile")
    header = (
        *("layer", "FFN: text", "retained", "summary", "skipped"),
        *("text looks at summaries", "last summary looks at skipped", "error, kept rows", "all rows"),
        *("bound by gains", "by constants"),
    )
    rows = []
    for layer in found["mean"]["layers"]:
        errors, paid = layer["skip_ffn"], layer["attention_paid"]
        rows.append(
            [
                str(layer["layer"]),
                *(f"{layer['ffn_update'][group]['mean']:.2g}" for group in ("text", "retained", "summary", "skipped")),
                percent(paid["text"]["group"]["summary"]),
                percent(paid["summary"]["group"]["skipped"]),
                *(percent(errors[name]) for name in ("relative_error_kept", "relative_error", "relative_bound_gains")),
                f"{errors['relative_bound']:.2g}",
            ]
        )
    last, next_token = found["mean"]["layers"][-1]["skip_ffn"], found["mean"]["next_token"]
    count, skip = len(found["pictures"]), found["skip"]
    calm = [
        str(layer["layer"])
        for layer in found["mean"]["layers"]
        if layer["ffn_update"]["skipped"]["mean"] < layer["ffn_update"]["text"]["mean"]
    ]
    return (
        f"{table(header, rows)}\n\n"
        f"{found['model']}, {skip['num_retained']} retained and {skip['num_skipped']} skipped tokens, means of {count}"
        f' pictures ({", ".join(found["pictures"])}), "{found["question"]}". The FFN changes skipped rows less than'
        f" text in layers {', '.join(calm) or 'none'} of {len(rows)}. Behind the last layer the bound by gains is"
        f" {last['relative_bound_gains'] / last['relative_error']:.2g} times the error, the one by constants"
        f" {last['relative_bound'] / last['relative_error']:.1g} times. The next token is the same on"
        f" {round(count * next_token['same'])} of {count}, KL {next_token['kl']:.1g} nats ({on_machine(found)})."
    )


def export_size() -> str:
    """Exporting models of real size, and what an int4 one does in chat."""
    found = result("export_size")
    rows, said = [], []
    for name, precisions in found.items():
        for precision, each in precisions.items():
            export, check = each["export"], each["export"]["check"]
            stages = [each["export"]["stages"][stage]["seconds"] for stage in _EXPORT_STAGES]
            rows.append(
                [
                    name,
                    precision,
                    gibibytes(each["checkpoint_bytes"]),
                    gibibytes(export["bundle_bytes"]),
                    *map(seconds, (export["seconds"], *stages)),
                    gibibytes(export["anonymous_bytes"]),
                    gibibytes(export["resident_bytes"]),
                    f"{check['num_tokens']} on {check['num_pictures']}",
                ]
            )
            if "chat" in each:
                chat = each["chat"]
                said.append(
                    f"- {name} in {precision}: first token of one question about one picture ({chat['rows']} rows)"
                    f" {seconds(chat['first_token_seconds'])} after the start, the second, which opens another graph,"
                    f" {seconds(chat['first_decode_seconds'])} later, then {chat['tokens_per_second']:.3g} tokens a"
                    f" second. Opening graphs is {seconds(chat['load_seconds'])} of that. Anonymous memory:"
                    f" {gibibytes(chat['prefill_memory']['anonymous_bytes'])} up to the first token,"
                    f" {gibibytes(chat['anonymous_bytes'])} with both graphs open"
                )
    header = ["checkpoint, random, fp16", "bundle in", "checkpoint", "bundle", "seconds", *_EXPORT_STAGES.values()]
    header += ["anonymous memory", "resident", "tokens compared"]
    machine = next(each for precisions in found.values() for each in precisions.values())
    memory = f"{machine['machine']['memory_gib']:g} GiB, {on_machine(machine)}"
    return f"{table(header, rows)}\n\n{memory}. Chat with the int4 bundles:\n\n" + "\n".join(said)


def model() -> str:
    """Sizes, from the recipe."""
    config: ModelConfig = read_scratch_recipe(_RECIPE).model
    vision, text, span = config.vision, config.text, ImageSpan.of(config)
    layers = ", ".join(map(str, vision.feature_layers))
    rows = [
        ["picture", f"{vision.image_size} x {vision.image_size} pixels, {vision.num_patches} patches"],
        [
            "vision encoder",
            f"ViT, {vision.num_layers} layers of {vision.hidden_size}, frozen; layers {layers} are read",
        ],
        ["retained", f"{span.num_retained} patches, by the attention of CLS in layer {vision.select_layer}"],
        ["skipped", f"{span.num_skipped} tokens, merged from the other {vision.num_patches - span.num_retained}"],
        ["kept after prefill", f"{span.num_kept} rows an image, {span.num_summary} of them summaries"],
        ["decoder", f"{text.num_layers} layers of {text.hidden_size}, FFN {text.intermediate_size}"],
        ["attention", f"{text.num_heads} heads of {text.head_dim}, {text.num_kv_heads} KV heads"],
    ]
    return "\n".join(["| | |", "|---|---|", *("| " + " | ".join(row) + " |" for row in rows)])


def vocabulary() -> str:
    """All that it has names for."""
    return (
        f"- {len(SHAPES)} shapes: {', '.join(SHAPES)};\n- in {len(COLOURS)} colours: {', '.join(COLOURS)};\n"
        f"- {len(KINDS)} kinds of things: {', '.join(kind.name for kind in KINDS)}."
    )


def row_order() -> str:
    """Why skipped rows lie last."""
    found = result("row_order")
    rows = []
    for case, each in found["cases"].items():
        held = each["mask_over_join"]
        times = (seconds(each[name]["median"]) for name in ("mask", "join"))
        rows.append([case, *times, f"{held['ratio']:.2f}", f"{held['low']:.2f} to {held['high']:.2f}"])
    return table(["layers x width, retained + skipped", "last, with a mask", "joined", "ratio", "95 %"], rows) + (
        "\n\nPrefill of a decoder in PyTorch: skipped rows last in memory, so that kept ones are a slice, against the"
        " paper's two tensors, which are joined before each attention and parted after it. What comes out"
        f" is equal. {found['rounds']} rounds, in turn; {on_machine(found)}."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "twins": twins,
    "speed": speed,
    "engines": engines,
    "start": start,
    "training": training_time,
    "training_ratio": training_ratio,
    "training_work": training_work,
    "selection": selection,
    "serving": serving,
    "soak": soak,
    "faults": faults,
    "kernels": kernels,
    "gpu": gpu,
    "gpu_engine": gpu_engine,
    "smollm2": smollm2,
    "smollm2_texts": smollm2_texts,
    "families": families,
    "loading": loading,
    "profile": profile,
    "row_order": row_order,
    "export_size": export_size,
    "model": model,
    "vocabulary": vocabulary,
}
