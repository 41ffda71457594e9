"""Jobs leave files: what was done is not done again."""

from __future__ import annotations

import json

from sklearn_medimb._machine.jobs import read_result, run_jobs


def halved(number, log):
    with log.open("a") as file:
        file.write(f"{number}\n")
    if number % 2:
        raise ValueError(f"{number} is odd")
    return {"half": number // 2}


def test_what_has_a_file_is_not_done_again_and_failures_stop_nobody(tmp_path):
    log = tmp_path / "log"
    jobs = {number: (number, log) for number in range(4)}
    path_of = lambda number: tmp_path / f"{number}.json"  # noqa: E731
    found, failed = run_jobs(halved, jobs, path_of, facts={"who": "me"})
    assert {name: result["half"] for name, result in found.items()} == {0: 0, 2: 1}
    assert failed == {1: "ValueError: 1 is odd", 3: "ValueError: 3 is odd"}
    assert json.loads(path_of(2).read_text()) == {"half": 1, "who": "me"}
    path_of(0).write_text("{")  # cut short
    assert read_result(path_of(0)) is None
    path_of(2).write_text("{}")  # of another kind
    log.unlink()
    again, _ = run_jobs(halved, jobs, path_of, needs=["half"])
    assert [again[0]["half"], again[2]["half"]] == [0, 1]
    assert sorted(log.read_text().split()) == ["0", "1", "2", "3"]


def test_without_files_nothing_is_kept(tmp_path, capfd):
    found, failed = run_jobs(halved, {"a": (8, tmp_path / "log")}, show=True)
    assert (found, failed) == ({"a": {"half": 4}}, {})
    assert "1/1" in capfd.readouterr().err
