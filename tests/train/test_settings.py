"""Configurations: what is accepted, what the short forms mean, and the sentences of the refusals."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.maths.trust_region import CosineCone, MeanCosine, NoRegion
from embedgrad.train.paths import expand_path, seen_from
from embedgrad.train.plan import with_defaults
from embedgrad.train.settings import OptimizeConfig, RunConfig, load_run_config
from embedgrad.util.errors import ConfigError, EmbedGradError

BASE = {"model": "m.gguf", "prompt": "Say it.", "data": {"path": "d.jsonl", "split": {"train": 10}}}


def write(folder: Path, values: Any) -> Path:
    path = folder / "first run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), "utf-8")
    return path


def test_defaults_and_short_forms(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, BASE | {"data": {"train": "a.jsonl", "test": {"path": "b", "limit": 3}}}))
    assert config.model.path == str(tmp_path / "m.gguf")
    assert config.prompt.text == "Say it."
    assert config.data.train is not None
    assert config.data.train.path == str(tmp_path / "a.jsonl")
    assert config.data.test is not None
    assert config.data.test.limit == 3
    assert config.run.name == "first run"
    assert config.optimize.trust_region == CosineCone(0.95)
    assert config.optimize.learning_rate == 2e-3


def test_written_configuration_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = {"messages": [{"role": "user", "content": "{prompt}\n{query}"}]}
    config = load_run_config(write(tmp_path, BASE | {"template": chat}), ["optimize.trust_region.kind=mean_cosine"])
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "runs" / "one"):  # config.yaml in a run's folder leads to the same files
        monkeypatch.chdir(tmp_path)
        values = config.model_dump(mode="json")
        seen_from(folder, values)
        again = load_run_config(write(folder, values))
        assert again.model_copy(update={"run": config.run}) == config
        assert Path(again.run.folder).absolute() == Path("runs").absolute()
    assert isinstance(again.optimize.trust_region, MeanCosine)
    assert again.template is not None
    assert again.template.kind == "chat"


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    sets = [
        "optimize.steps=7", "optimize.trust_region.tau=0.9", "model.dtype=float64", "template=plain",
        "data.labels=['yes', 'no']", "sampling.stop=['\\n']", "run.name=second", "optimize.learning_rate=1e-3",
    ]  # fmt: skip
    config = load_run_config(path, sets)
    assert config.optimize.steps == 7
    assert config.optimize.trust_region == CosineCone(0.9)
    assert config.model.path == str(tmp_path / "m.gguf")
    assert config.model.dtype == "float64"
    assert config.template is not None
    assert config.template.kind == "plain"
    assert config.run.name == "second"
    assert config.optimize.learning_rate == 1e-3
    assert load_run_config(path, ["optimize.trust_region=none"]).optimize.trust_region == NoRegion()


def test_overrides_refuse_yaml_booleans_as_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.labels\.0 is True, but should be text"):
        load_run_config(write(tmp_path, BASE), ["data.labels=[yes, no]"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 3}, ["stepz", "did you mean 'steps'"]),
        ({"zzz": 3}, ["zzz", "known are", "learning_rate"]),
        ({"steps": 0}, ["steps is 0", "greater than or equal to 1"]),
        ({"steps": "many"}, ["steps is 'many'", "integer"]),
        ({"steps": 2.5}, ["steps is 2.5", "integer"]),
        ({"steps": True}, ["steps", "not true or false"]),
        ({"steps": 2, "epochs": 1}, ["steps", "epochs", "one of them"]),
        ({"optimizer": "adam"}, ["optimizer is 'adam'", "'adamw' or 'sgd'"]),
        ({"schedule": "cos"}, ["'constant', 'linear' or 'cosine'"]),
        ({"select_by": "exact"}, ["'accuracy' or 'loss'"]),
        ({"learning_rate": 0}, ["learning_rate is 0", "greater than 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan", "finite"]),
        ({"betas": [0.9, 1.0]}, ["betas.1 is 1.0", "less than 1"]),
        ({"trust_region": {"tau": 1.5}}, ["trust_region", "tau is 1.5", "from -1 to 1"]),
        ({"trust_region": {"tau": -1.5}}, ["trust_region", "tau is -1.5", "from -1 to 1"]),
        ({"trust_region": "cone"}, ["trust_region", "'cone'", "mean_cosine"]),
        ({"trust_region": 3}, ["trust_region is 3", "cosine, mean_cosine"]),
        ({"trust_region": None}, ["trust_region is None", "none"]),
        ({"memory_budget": "plenty"}, ["memory_budget", "2GiB"]),
        ({"memory_budget": 0}, ["memory_budget"]),
        ({"seed": -1}, ["seed is -1"]),
    ],
)
def test_unusable_optimiser_settings(values: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """The same refusal from the constructor and from a file, where the key has its whole path."""
    with pytest.raises(ConfigError) as direct:
        OptimizeConfig(**values)
    with pytest.raises(ConfigError) as from_file:
        load_run_config(write(tmp_path, BASE | {"optimize": values}))
    for word in words:
        assert word in str(direct.value)
        assert word in str(from_file.value)
    assert "first run.yaml" in str(from_file.value)
    assert f"optimize.{next(iter(values))}" in str(from_file.value) or "optimize:" in str(from_file.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("", ["first run.yaml", "mapping"]),
        ("- a", ["first run.yaml", "mapping"]),
        ("a: [1,\nb", ["first run.yaml", "line 2"]),
        ("model: \x01", ["first run.yaml", "not YAML"]),
        ({"prompt": "x"}, ["model is missing", "data is missing"]),
        (BASE | {"optimise": {}}, ["optimise", "did you mean 'optimize'"]),
        (BASE | {"model": 3}, ["model is 3", "mapping"]),
        (BASE | {"model": {"path": "m", "dtype": "int8"}}, ["model.dtype is 'int8'", "'float32'"]),
        (BASE | {"prompt": {}}, ["prompt", "text or file"]),
        (BASE | {"prompt": {"text": "a", "file": "b"}}, ["prompt", "text or file"]),
        (BASE | {"data": {"path": "d"}}, ["data", "path and split"]),
        (BASE | {"data": {"split": {"train": 3}}}, ["data", "path and split"]),
        (BASE | {"data": {"path": "d", "split": {"train": 3}, "test": "t"}}, ["data", "split"]),
        (BASE | {"data": {"path": "d", "split": {"trian": 3}}}, ["data.split.trian", "'train'"]),
        (BASE | {"data": {"train": {"path": "d", "limits": 3}}}, ["data.train.limits", "did you mean 'limit'"]),
        (BASE | {"run": {"name": ".."}}, ["run.name", "'..'"]),
        (BASE | {"run": {"name": "a/b"}}, ["run.name", "'a/b'"]),
        (BASE | {"template": {"kind": "chat", "messages": []}}, ["template", "at least one message"]),
        (BASE | {"template": {"kind": "text", "text": "{prompt}"}}, ["template", "{query}"]),
        (BASE | {"sampling": {"top_p": 0}}, ["sampling.top_p is 0", "greater than 0"]),
    ],
)
def test_unusable_files(values: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_run_config(write(tmp_path, values))
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimize", ["'optimize'", "section.key=value"]),
        ("=3", ["'=3'"]),
        ("optimize..steps=3", ["optimize..steps"]),
        ("optimize.steps=[", ["optimize.steps", "not YAML"]),
        ("prompt.text=2024-13-45", ["'prompt.text=2024-13-45'", "not YAML", "month must be in 1..12"]),
        ("prompt.text=!!bool x", ["not YAML"]),
        (f"prompt.text={'[' * 5000}", ["nested too deeply"]),
        ("data.path.x=3", ["path", "no settings of its own"]),
        ("optimize.step=3", ["optimize.step", "did you mean 'steps'"]),
    ],
)
def test_unusable_overrides(override: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_run_config(write(tmp_path, BASE), [override])
    for word in words:
        assert word in str(refusal.value)


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_run_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_run_config(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run_config(path)
    path.write_text("prompt: 2024-13-45")
    with pytest.raises(ConfigError, match=r"latin\.yaml is not YAML: month must be"):
        load_run_config(path)


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(), lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*RunConfig.model_fields, *OptimizeConfig.model_fields, "path", "kind"]), inner)
), max_leaves=12))  # fmt: skip
def test_any_values_are_accepted_or_refused_in_words(values: Any) -> None:
    for section in (RunConfig, OptimizeConfig):
        if isinstance(values, dict):
            with contextlib.suppress(EmbedGradError):  # any other exception fails the test
                section(**values)


def test_lengths_of_a_run() -> None:
    assert OptimizeConfig(batch_size=16).total_steps(33) == 3
    assert OptimizeConfig(batch_size=16, epochs=4).total_steps(32) == 8
    assert OptimizeConfig(steps=5).total_steps(1000) == 5
    assert OptimizeConfig(steps=5).validation_interval(1000) == 1
    assert OptimizeConfig(steps=500).validation_interval(1000) == 50
    assert OptimizeConfig(steps=500, validate_every=7).validation_interval(1000) == 7


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("800MB", 800_000_000), ("1.5k", 1500), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert OptimizeConfig(memory_budget=text).memory_budget == size


def test_paths_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "/tmp/there")
    assert expand_path("$SOMEWHERE/x.jsonl") == Path("/tmp/there/x.jsonl")
    assert expand_path("~/x") == Path(os.path.expanduser("~/x"))


def test_a_task_needs_no_prompt_and_own_files_do(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, {"model": "m", "data": {"task": "imdb"}}), ["optimize.monitors.gap=stop"])
    assert config.prompt is None
    assert config.data.task == "imdb"
    assert config.optimize.monitors.gap.action == "stop"
    again = load_run_config(write(tmp_path, config.model_dump(mode="json")), ["optimize.monitors.gap.threshold=0.2"])
    assert (again.optimize.monitors.gap.threshold, again.optimize.monitors.gap.action) == (0.2, "stop")
    for data in ({"train": "a"}, {"task": "jsonl", "train": "a"}):
        with pytest.raises(ConfigError, match="prompt is missing"):
            load_run_config(write(tmp_path, {"model": "m", "data": data}))


def test_a_tasks_defaults_give_way_to_what_is_said() -> None:
    defaults = {"steps": 50, "batch_size": 8, "monitors": {"answers": 16, "gap": "stop"}}
    filled = with_defaults(OptimizeConfig(epochs=2, monitors={"gap": "ignore"}), defaults)
    assert (filled.steps, filled.epochs, filled.batch_size) == (None, 2, 8)
    assert (filled.monitors.answers, filled.monitors.gap.action) == (16, "ignore")
    assert filled.learning_rate == OptimizeConfig().learning_rate
    told = with_defaults(OptimizeConfig(trust_region={"tau": 0.8}), {"steps": 50})
    assert (told.steps, told.trust_region) == (50, CosineCone(0.8))


def test_relative_paths_count_from_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "conf"
    inner.mkdir()
    monkeypatch.chdir(tmp_path)
    paths = {"train": "a.jsonl", "validation": {"path": "../b.jsonl"}, "test": "/c.jsonl"}
    values = BASE | {"data": paths, "prompt": {"file": "p.txt"}, "run": {"folder": "out"}}
    config = load_run_config(write(inner, values).relative_to(tmp_path), ["data.train.path=d.jsonl"])
    assert config.model.path == "conf/m.gguf"
    assert config.prompt is not None
    assert config.prompt.file == "conf/p.txt"
    assert [part.path for part in (config.data.train, config.data.validation, config.data.test) if part] == [
        "d.jsonl", "b.jsonl", "/c.jsonl",
    ]  # fmt: skip
    assert config.run.folder == "conf/out"
    assert load_run_config(write(inner, BASE)).run.folder == "runs"
    assert load_run_config(write(inner, BASE | {"model": "org/name@main"})).model.path == "org/name@main"
    monkeypatch.setenv("SOMEWHERE", "/there")
    assert load_run_config(write(inner, BASE | {"model": "$SOMEWHERE/m"})).model.path == "$SOMEWHERE/m"


@pytest.mark.parametrize(
    ("name", "values"),
    [("model.path", {"model": "x"}), ("prompt.file", {"prompt": {"file": "x"}}), ("data.path", {}),
     ("data.train.path", {"data": {"train": "x"}})],
)  # fmt: skip
def test_a_file_in_the_current_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, values: dict[str, Any]
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "x").touch()
    monkeypatch.chdir(tmp_path)
    data = {"path": "x", "split": {"train": 1}}
    with pytest.raises(ConfigError, match=rf"{name} is 'x', but there is no .*conf/x: .* is '\.\./x'"):
        load_run_config(write(tmp_path / "conf", BASE | {"data": data} | values))


@pytest.mark.parametrize(
    ("where", "key", "meant"),
    [
        ("optimize", "lr", "'learning_rate'"), ("optimize", "num_train_epochs", "'epochs'"),
        ("optimize", "per_device_train_batch_size", "'batch_size'"), ("optimize", "tau", "'trust_region'"),
        ("optimize", "max_grad_norm", "'clip_norm'"), ("optimize", "Learning-Rate", "'learning_rate'"),
        ("data", "val", "'validation'"), ("data", "dev", "'validation'"), ("data", "classes", "'labels'"),
        ("model", "model_name_or_path", "'path'"), ("model", "torch_dtype", "'dtype'"),
        ("run", "output_dir", "'folder'"),
        ("sampling", "max_tokens", "'max_new_tokens'"), ("", "lr", "'optimize.learning_rate'"),
        ("", "epochs", "'optimize.epochs'"), ("", "dataset", "'data'"), ("", "labels", "'data.labels'"),
        ("optimize", "max_new_tokens", "'sampling.max_new_tokens'"), ("data", "num_train_epochs", "'optimize.epochs'"),
    ],
)  # fmt: skip
def test_names_of_other_programs(tmp_path: Path, where: str, key: str, meant: str) -> None:
    values: dict[str, Any] = {**BASE, "optimize": {}, "sampling": {}, "run": {}, "model": {"path": "m"}}
    values["data"] = dict(BASE["data"])  # type: ignore[call-overload]
    (values[where] if where else values)[key] = 1
    with pytest.raises(ConfigError, match=f"{key} is not a setting; did you mean {meant}"):
        load_run_config(write(tmp_path, values))


@pytest.mark.parametrize(
    ("override", "labels"),
    [("data.labels.0=x", ["x", "b"]), ("data.labels.1='no'", ["a", "no"]), ("data.labels.2=c", ["a", "b", "c"])],
)
def test_overrides_of_items(tmp_path: Path, override: str, labels: list[str]) -> None:
    data = {**BASE["data"], "labels": ["a", "b"]}  # type: ignore[dict-item]
    assert load_run_config(write(tmp_path, BASE | {"data": data}), [override]).data.labels == tuple(labels)


def test_overrides_inside_of_items(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "{query}"}]
    path = write(tmp_path, BASE | {"template": {"messages": messages}})
    found = load_run_config(path, ["template.messages.1.content=Now {query}"]).template
    assert found is not None
    assert found.messages == (("system", "{prompt}"), ("user", "Now {query}"))
    for index in ("3", "-1", "x", "99999999999"):
        with pytest.raises(ConfigError, match="from 0 to 2"):
            load_run_config(path, [f"template.messages.{index}=x"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 9), st.floats(0.01, 0.99)), min_size=3, max_size=3))
def test_sizes_and_fractions(tmp_path_factory: pytest.TempPathFactory, sizes: list[float | None]) -> None:
    split = {name: size for name, size in zip(("train", "validation", "test"), sizes, strict=True) if size is not None}
    path = write(tmp_path_factory.mktemp("sizes"), BASE | {"data": {"path": "d", "split": split}})
    too_much = sum(size for size in sizes if isinstance(size, float)) > 1 + 1e-9
    if sizes[0] in (None, 0) or too_much:
        with pytest.raises(ConfigError, match=r"train|add up"):
            load_run_config(path)
        return
    found = load_run_config(path).data.split
    assert found is not None
    assert [found.train, found.validation, found.test] == sizes


@pytest.mark.parametrize("size", [1.5, 1.0, -0.1, "many", True, -3])
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match="a fraction such as"):
        load_run_config(write(tmp_path, BASE | {"data": {"path": "d", "split": {"train": size}}}))
