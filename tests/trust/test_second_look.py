"""What an independent attempt to break the rest found: each hole that it opened, closed."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sftlab.assets import SCHEME, locate
from sftlab.checkpoints.manifest import complete_checkpoints
from sftlab.common import squeue, time_limit
from sftlab.common.files import LinkRefused, read_jsonl, write_jsonl
from sftlab.common.owner import FILE, Hold, living, read_owner, this_process
from sftlab.common.ports import keep_store, visit_store
from sftlab.data.formats.chat import Chat
from sftlab.data.template import ChatTemplate, SlowTemplate, prepare_tokenizer
from sftlab.inference.prompts import Request, answered
from sftlab.inference.trained_model import resolve
from sftlab.models.foreign import own_code
from sftlab.models.load import Model
from sftlab.sweeps import again, tables
from sftlab.sweeps.points import rank_logs, read_point, series
from sftlab.sweeps.record import Sweep
from tests.support import byte_tokenizer, free_port, on_ranks, tiny_llama
from tests.support import join as join_rank

PRIVATE = '{"prompt": "what nobody else may see"}\n'


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user's."""
    (tmp_path / "mine.txt").write_text(PRIVATE)
    return tmp_path / "mine.txt"


# Who holds a run ------------------------------------------------------------------------------------------------------


def test_a_pipe_in_place_of_the_owner_s_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    """A sweep's status reads it of every point, and opening a pipe waits for a writer who never comes."""
    (tmp_path / "0").mkdir()
    os.mkfifo(tmp_path / "0" / FILE)
    assert read_owner(tmp_path / "0") is None and living(tmp_path / "0") is None
    assert read_point(tmp_path, 0, {}, {}).state == "missing"
    with pytest.raises(OSError):
        Hold(tmp_path / "0", [this_process()]).take()


def test_a_second_name_of_my_file_in_place_of_the_owner_s_is_not_written(tmp_path: Path, mine: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).hardlink_to(mine)
    with pytest.raises(LinkRefused, match="hard link"):
        Hold(tmp_path / "run", [this_process()]).take()
    assert mine.read_text() == PRIVATE


def test_an_owner_s_file_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(1 << 36)
    assert read_owner(tmp_path) is None


# Sweeps ---------------------------------------------------------------------------------------------------------------

ODD_NUMBERS = {
    "an infinite step": ('{"step": 1e999, "time_s": 1}\n', "{}"),
    "no time": ('{"step": 3, "train/loss": 1.0}\n', "{}"),
    "a step that is no number": ('{"step": NaN, "time_s": 1, "val/loss": 1}\n', "{}"),
    "infinite steps": ('{"step": 3, "time_s": 1}\n', '{"status": "finished", "last": {"step": 3}, "steps": Infinity}'),
    "a step of 400 digits": (f'{{"step": {"9" * 400}, "time_s": 1, "val/loss": {"9" * 400}}}\n', "{}"),
    "steps of 400 digits": ("", f'{{"status": "finished", "last": {{"step": {"9" * 400}}}, "steps": {"9" * 400}}}'),
    "an error of another kind": ("", '{"status": "failed", "error": [1, {"a": null}]}'),
}


@pytest.mark.parametrize("odd", ODD_NUMBERS)
def test_numbers_of_a_point_that_no_run_writes_keep_nothing_from_being_shown(odd: str, tmp_path: Path) -> None:
    metrics, summary = ODD_NUMBERS[odd]
    (tmp_path / "0").mkdir()
    (tmp_path / "0/metrics.jsonl").write_text(metrics + '{"torn')
    (tmp_path / "0/summary.json").write_text(summary)
    (tmp_path / "0/train.log").write_text("step 3/60\n")
    found = Sweep(tmp_path).observed({})
    assert tables.status(found, "val/loss").row_count == 1
    assert tables.failures(found) or found.points[0].state != "failed"
    series(tmp_path / "0", "val/loss")


def test_a_nested_line_at_the_end_of_a_point_s_metrics_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0/metrics.jsonl").write_text('{"step": 3, "time_s": 1}\n' + "[" * 20_000 + "\n")
    assert read_point(tmp_path, 0, {}, {}).step == 3


def test_a_sweep_of_odd_files_is_shown_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sftlab import sweep

    last = {"step": 6, "val/loss": 1.0, "time_s": 1}
    good = json.dumps({"status": "finished", "last": last, "best": {"val/loss": 1.0}, "steps": 6})
    files = {
        "0/summary.json": '{"status": "failed", "error": {"a": 1}, "last": [], "best": "x"}',
        "0/environment.json": '{"git_commit": 5, "command": {"a": 1}}',
        "1/metrics.jsonl": '{"step": 1e400, "time_s": "x"}\n[1]\n{"step": 2, "val/loss": 1e308}\n"x"\n5\n',
        "1/overrides.yaml": "[optim.lr=1, 5, null, [a]]",
        "2/overrides.yaml": "a: {b: 1}",
        "2/summary.json": good,
        "2/metrics.jsonl": '{"step": 6, "time_s": 1, "val/loss": 1.0, "train/loss": "x"}\n',
        "2/samples.jsonl": '{"step": 1, "id": 1}\n"x"\n{}\n{"step": 6, "id": "a", "answer": "one\u2028two"}\n',
        "3/summary.json": "[]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sys.argv", ["sweep", f"dir={tmp_path}"])
    sweep.main()
    assert "point 0" in capsys.readouterr().out
    assert r"one\u2028two" in (tmp_path / "report.html").read_text()


def test_an_answer_with_a_line_separator_is_read_back(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    write_jsonl(tmp_path / "a.jsonl", [{"index": 0, "prompt": text, "answer": text}])
    assert read_jsonl(tmp_path / "a.jsonl")[0]["answer"] == text
    assert answered(tmp_path / "a.jsonl", [Request(text, (), False)], {})[0]["answer"] == text


@pytest.mark.parametrize("job", ["/etc", "../../mine", "**", "12*", "[a-z]", "\u202e12", "--me", {"a": 1}])
def test_a_job_that_is_no_name_finds_no_logs(job: Any, tmp_path: Path) -> None:
    entry = {"num": 0, "run_dir": "0", "job_id": job, "overrides": []}
    (tmp_path / "sweep.json").write_text(json.dumps({"points": [entry]}))
    with pytest.raises(ValueError, match="is not the record of a sweep"):
        Sweep.read(tmp_path)


def test_logs_behind_a_link_are_somebody_s_own(tmp_path: Path) -> None:
    (tmp_path / "mine/local_0").mkdir(parents=True)
    (tmp_path / "mine/local_0/0_0_log.err").write_text("ValueError: private")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/.submitit").symlink_to(tmp_path / "mine")
    assert rank_logs(tmp_path / "sweep", None, 0) == []
    shutil.copytree(tmp_path / "mine", tmp_path / "other/.submitit")
    assert len(rank_logs(tmp_path / "other", None, 0)) == 1


@pytest.mark.parametrize("how", ["link", "hard link", "pipe"])
def test_the_journal_of_a_search_is_not_appended_to_elsewhere(how: str, tmp_path: Path, mine: Path) -> None:
    pytest.importorskip("optuna", reason="the extra sftlab[optuna] is not installed")
    from tests.sweeps.test_search import make_search

    (tmp_path / "sweep").mkdir()
    path = tmp_path / "sweep/optuna.jsonl"
    os.mkfifo(path) if how == "pipe" else path.symlink_to(mine) if how == "link" else path.hardlink_to(mine)
    with pytest.raises(OSError):
        make_search(tmp_path / "sweep", 1)
    assert mine.read_text() == PRIVATE


@pytest.mark.parametrize("what", ["\x1b]0;title\x07", "\x9b2J", "\u202egnp.exe", "[link=file:///etc]x[/link]"])
def test_a_log_s_words_are_shown_as_text(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Why a point died is quoted from logs, which a run or anybody may have written."""
    from sftlab import sweep

    (tmp_path / "sweep/0").mkdir(parents=True)
    (tmp_path / "sweep/0/summary.json").write_text('{"status": "failed", "error": "RankLost: rank 1"}')
    logs = tmp_path / "sweep/.submitit/local_0"
    logs.mkdir(parents=True)
    (logs / "0_1_log.err").write_text(f"Traceback (most recent call last)\nValueError: said {what} it\n")
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"points": [{"num": 0, "run_dir": "0", "job_id": None}]}))
    monkeypatch.setattr("sys.argv", ["sweep", f"dir={tmp_path / 'sweep'}"])
    sweep.main()
    shown = capsys.readouterr().out
    assert "ValueError: said" in shown and not any(c in shown for c in "\x1b\x07\x9b\u202e")
    assert "[link=" in shown or "[link=" not in what


def test_a_foreign_record_cancels_no_job_of_mine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {"7_0": tmp_path / "sweep/.submitit/x.sh", "8": tmp_path / "mine/.submitit/x.sh", "9": "(null)", "10": ""}
    entries = [{"num": n, "run_dir": str(n), "job_id": job, "overrides": []} for n, job in enumerate(scripts)]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"points": entries}))
    answers = {job: squeue.Job("RUNNING", script=str(script)) for job, script in scripts.items()}
    cancelled: list[str] = []
    monkeypatch.setattr(squeue, "states", lambda ids: {job: answers[job] for job in ids})
    monkeypatch.setattr(squeue, "cancel", cancelled.extend)
    again.cancel(Sweep.read(tmp_path / "sweep").observed(answers), Console())
    assert cancelled == ["7_0", "10"]  # SLURM does not always say what a job runs
    assert "job 8 is not of this sweep" in capsys.readouterr().out


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../mine.safetensors", "/ABSOLUTE", "a/../../mine.safetensors", "..\\mine.safetensors"]
)
def test_an_index_of_weights_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    """Else somebody's model folder would take in a private model's weights, which are trained and published from it."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5GB")
    shutil.move(tmp_path / "theirs/model.safetensors", tmp_path / "mine.safetensors")
    name = name.replace("/ABSOLUTE", str(tmp_path / "mine.safetensors"))
    tensors = load_file(tmp_path / "mine.safetensors")
    theirs = Model(str(tmp_path / "theirs"))
    config = theirs.load_config(torch.device("cpu"))
    index = tmp_path / "theirs/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))
    for read in (
        lambda: theirs.load_config(torch.device("cpu")),
        lambda: theirs.weight_files(config),
        lambda: theirs.load_weights(config, 0),
        lambda: resolve(str(tmp_path / "theirs")).load_model(),
    ):
        with pytest.raises(ValueError, match="the files of a model lie in its own folder"):
            read()
    save_file(tensors, tmp_path / "theirs/part.safetensors", metadata={"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    assert set(theirs.weight_files(config)) == set(tensors)
    resolve(str(tmp_path / "theirs")).load_model()


CODE: tuple[dict[str, Any], ...] = (
    {"_attn_implementation_internal": "owner/kernel"},
    {"text_config": {"attn_implementation": "owner/kernel"}},
    {"vision_config": {"auto_map": {"AutoConfig": "configuration_own.Own"}}},
    {"attn_implementation": {"text_config": "owner/kernel"}},
    {"parts": [{"auto_map": {"AutoConfig": ["owner/kernel--configuration_own.Own", None]}}]},
)


@pytest.mark.parametrize("config", CODE)
def test_code_that_a_part_of_a_model_names_is_found(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert any("owner/kernel" in name or "configuration_own" in name for name in own_code(tmp_path))


def test_a_shipped_file_is_named_inside_the_shipped_folder(mine: Path) -> None:
    """The card shows the first row of shipped data, which `asset://../..` would make a private one."""
    up = os.path.relpath(mine, Path(locate(f"{SCHEME}chat.jinja")).parent)
    for name in (f"{SCHEME}{up}", f"{SCHEME}{mine}"):
        with pytest.raises(ValueError, match="outside of the shipped files"):
            locate(name)
    assert Path(locate(f"{SCHEME}chat.jinja")).is_file()


# Templates ------------------------------------------------------------------------------------------------------------

HUGE = {
    "a power": "{{ 10 ** 1000000000 }}",
    "a long text": "{{ 'a' * 10000000000 }}",
    "a long list": "{{ (10000000000 * [1]) | length }}",
    "squares": "{% set n = namespace(x=7) %}{% for i in range(64) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a width": "{{ 'a'.center(10000000000) }}{{ '1'.zfill(10000000000) }}",
    "a filter's width": "{{ 'a' | center(10000000000) }}",
    "a named width": "{{ 'a' | indent(width=10000000000) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a format's filter": "{{ '%10000000000d' | format(1) }}",
    "a format's argument": "{{ '%*d' % (10000000000, 1) }}",
    "a field's width": "{{ '{:>10000000000}'.format('a') }}",
    "a mapped field's width": "{{ '{a:>10000000000}'.format_map({'a': 'x'}) }}",
    "a width in a field": "{{ '{:>{}}'.format('a', '1' ~ '0' * 10) }}",
    "many long values": "{% set a = 'a' * 1000000 %}{{ ('%s' * 400) % ((a,) * 400) }}",
    "a replacement": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "a replacement of nothing": "{% set a = 'a' * 1000000 %}{{ a.replace('', a) }}",
    "a replacement's filter": "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "a join": "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
    "a join's filter": "{% set a = 'a' * 100000 %}{{ a | join(a) }}",
    "a translation": "{% set a = 'a' * 1000000 %}{{ a.translate({97: a}) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "bytes of a number": "{{ (5).to_bytes(10000000000, 'big') }}",
    "a rounding": "{{ 1 | round(-1000000000) }}",
    "an indent of JSON": "{{ {'a': 1} | tojson(indent=10000000000) }}",
    "an indent of lines": "{{ ('\n' * 1000000) | indent('a' * 1000000, true, true) }}",
    "a wide indent of lines": "{{ ('\n' * 1000000) | indent(1000000, true, true) }}",
    "what wraps words": "{{ ('a ' * 400000) | wordwrap(1, wrapstring='a' * 1000000) }}",
    "a target of links": "{{ ('http://a.b ' * 90000) | urlize(target='a' * 1000000) }}",
    "a sum of lists": "{{ ([[1] * 100000] * 100000) | sum(start=[]) | length }}",
    "an output": "{% set a = 'a' * 1000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "a text of an output": "{% set a = 'a' * 1000000 %}"
    "{% set b %}{% for i in range(999) %}{{ a }}{% endfor %}{% endset %}",
    "a comparison": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "a list in itself": "{% set n = namespace(x=(1,)) %}"
    "{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x }}",
    "an object in itself": "{% set n = namespace(x=1) %}"
    "{% for i in range(60) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x }}",
    "an object's constructor": "{% set n = namespace(x={}) %}{% for i in range(60) %}"
    "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
}


@pytest.mark.parametrize("how", HUGE)
def test_one_operation_of_a_template_neither_takes_for_ever_nor_fills_memory(how: str) -> None:
    """The limit of time cannot end these: they compute inside C."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}" + HUGE[how]
    began_s = time.process_time()
    with pytest.raises(ValueError, match="SecurityError"):
        prepare_tokenizer(tokenizer, [Chat()])
        ChatTemplate(tokenizer).text([{"role": "user", "content": "a"}])
    assert time.process_time() - began_s < 5


def test_a_namespace_is_not_shown_with_all_that_it_holds() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% set n = namespace(x=1) %}{% for i in range(60) %}{% set m = namespace() %}"
        "{% set m.a = n.x %}{% set m.b = n.x %}{% set n.x = m %}{% endfor %}{{ n.x }}"
    )
    assert "<Namespace>" in ChatTemplate(tokenizer).text([{"role": "user", "content": "a"}])


def test_a_template_that_doubles_a_text_is_stopped_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "MOST_BYTES", 64 << 20)
    monkeypatch.setattr(time_limit, "LOOK_S", 0.02)
    monkeypatch.setattr("sftlab.data.template.TEMPLATE_S", 100.0)  # on a machine with much else to do
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% set n = namespace(x='abcdefgh' * 10000, all=[]) %}"
        "{% for i in range(99999) %}{% set n.all = n.all + [n.x ~ i] %}{% endfor %}"
    )
    with pytest.raises(SlowTemplate, match="MiB of memory"):
        prepare_tokenizer(tokenizer, [Chat()])


def test_what_honest_templates_compute_is_allowed() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ '=' * 20 }}{{ 2 ** 10 }}{{ 'a' | center(9) }}{{ '%05.2f%%' % 1.5 }}{{ '%s' | format('x') }}"
        "{{ 'a\nb' | indent(2) }}{{ 7 % 2 }}{{ 'a'.ljust(3) }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        "{{ '{:>4}|{}'.format('a', 'b') }}{{ 'a-b'.replace('-', '+') }}{{ ['a', 1] | join(', ') }}{{ 1.25 | round(1) }}"
        "{{ [1, 2] | sum }}{{ {'a': [1]} | tojson(indent=1) }}{{ 'a' ~ 1 ~ [2] }}{{ [(1, 2), {'a': 'b'}] }}"
        "{% for a, b in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}{{ '-'.join(['a', 'b']) }}{{ 'a' | replace('a', 'b') }}"
    )
    prepare_tokenizer(tokenizer, [Chat()])
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text.startswith("<s>" + "=" * 20 + "1024    a    01.50%x")
    assert text.endswith("</s>   a|ba+ba, 11.23{\n \"a\": [\n  1\n ]\n}a1[2][(1, 2), {'a': 'b'}]12a-bb")


# The network ----------------------------------------------------------------------------------------------------------


def listening(port: int) -> set[str]:
    """Return the addresses on which this machine listens at a port, from the kernel's own tables."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, _, number = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def where_ranks_meet(rank: int, ranks: int, port: int) -> set[str]:
    from sftlab.parallel.world import world

    join_rank(rank, ranks, port)
    with world() as here:
        assert here.gather(rank) == list(range(ranks))
        return listening(port)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_the_ranks_of_one_node_meet_on_loopback() -> None:
    for found in on_ranks(where_ranks_meet, 2, 2, free_port()):
        assert found == {"0100007F"}


def test_a_store_is_kept_and_visited() -> None:
    port = free_port()
    kept = keep_store("127.0.0.1", port)
    visit_store("127.0.0.1", port).set("a", "b")
    assert kept.get("a") == b"b"


def test_the_gpu_script_installs_where_nobody_else_may_plant_code() -> None:
    script = Path(__file__).parents[2] / "experiments/gpu/run.sh"
    line = next(line for line in script.read_text().splitlines() if "KIT_INSTALLED:-" in line)
    done = subprocess.run(
        ["bash", "-c", f"{line}; echo $installed"],
        env={"HOME": "/home/ada"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "/home/ada/.cache/sftlab/kit\n"


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["checkpoints", "checkpoints/step_00000040"])
def test_a_private_run_s_checkpoints_are_not_exported_into_a_foreign_run(link: str, tmp_path: Path) -> None:
    private, theirs = tmp_path / "private", tmp_path / "theirs"
    (private / "checkpoints/step_00000040").mkdir(parents=True)
    (private / "checkpoints/step_00000040/checkpoint.json").write_text("{}")
    (theirs / link).parent.mkdir(parents=True)
    (theirs / link).symlink_to(private / link)
    assert len(complete_checkpoints(private / "checkpoints")) == 1
    with pytest.raises(LinkRefused):
        complete_checkpoints(theirs / "checkpoints")


def test_an_index_with_a_great_number_of_memos_takes_no_memory() -> None:
    """pickle's C code makes room for all memos up to the highest: these 10 bytes would take 32 GiB."""
    from sftlab.checkpoints.index import NoIndex, read_index

    before_bytes = time_limit.resident_bytes()
    with pytest.raises(NoIndex):
        read_index(b"\x80\x02}r" + (0x7FFFFFFF).to_bytes(4, "little") + b".")
    assert time_limit.resident_bytes() - before_bytes < 1 << 28
