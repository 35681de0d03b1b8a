import json

import pandas as pd
import pytest

from ofutils import UserError, reference, report

ID = "he2024-soap-w8a8"


def save(root, verdicts, scale="gpu", notebook="03_quant"):
    folder = root / "figures" / notebook
    folder.mkdir(parents=True)
    reference.verdict_table(verdicts).to_csv(folder / "verdicts.csv", index=False)
    (folder / "verdicts.json").write_text(json.dumps({"scale": scale}))
    return folder / "verdicts.csv"


def row(root, id=ID):
    return report.scoreboard(root).set_index("id").loc[id]


def test_what_has_not_run_says_so(tmp_path):
    board = report.scoreboard(tmp_path)
    claims = [claim.id for paper in report.PAPERS for claim in reference.claims() if claim.paper == paper]
    assert sorted(board["id"]) == sorted(claims) and list(dict.fromkeys(board["paper"])) == list(report.PAPERS)
    twice = [id for id in claims if id.replace("-lab-", "-") in claims and "-lab-" in id]
    places = {id: place for place, id in enumerate(board["id"])}
    assert twice and all(places[id] == places[id.replace("-lab-", "-")] + 1 for id in twice)
    assert set(board["verdict"]) == {"not run yet"} and (board["n"] == 0).all() and board["ours"].isna().all()
    counts = board["setting"].value_counts()
    waiting = {one: f"of {counts[one]} claims, {counts[one]} have not been run yet" for one in reference.SETTINGS}
    said = f"On models trained on text: {waiting['text']}; on images: {waiting['images']}; "
    said += f"on a checkpoint: {waiting['checkpoint']}; "
    said += f"in the laboratory: {waiting['laboratory']}; "
    statements = len(set(map(report.statement, board["id"])))
    said += f"{statements} of {statements} statements are open in every setting."
    assert report.summary(board) == said


def test_a_verdict_brings_its_numbers_margin_and_scale(tmp_path):
    save(tmp_path, [reference.compare("it saves", [0.5, 0.6, 0.7], 0.4, "0.9 (he2024, table 2)", id=ID)])
    found = row(tmp_path)
    assert (found["ours"], found["n"], found["scale"]) == (pytest.approx(0.6), 3, "gpu")
    assert found["verdict"] == "holds" and found["number"] == "0.9 (he2024, table 2)"
    assert found["rule"].endswith("above 0.4")  # the margin that was used, not the one of claims.yaml


def test_where_no_number_compares_the_papers_own_stand_in_words(tmp_path):
    save(tmp_path, [reference.compare("it saves", [0.5], 0.25, reference.NO_NUMBER, id=ID)])
    assert row(tmp_path)["number"] == reference.claim(ID).numbers != ""


def test_markdown_groups_by_paper_links_and_counts(tmp_path):
    made = [reference.compare("it saves", [0.5, 0.6, 0.7], 0.25, "0.9 (he2024, table 2)", id=ID)]
    made.append(reference.compare("op loses", [-0.2, -0.2, -0.2], -0.05, reference.NO_NUMBER, id="he2024-op-fp"))
    made.append(reference.compare("gate", [1.0], 2.0, reference.NO_NUMBER, id="bondarenko2023-gated-norm"))
    made.append(reference.compare("ours alone", [1.0, 1.0, 1.1], 0.0, reference.NO_NUMBER))
    save(tmp_path, made)
    text = report.render(report.scoreboard(tmp_path), tmp_path)
    assert "1 holds, 1 does not hold, 1 cannot be tested at the scale that ran" in text and "ours alone" not in text
    assert text.index(report.PAPERS["bondarenko2023"]) < text.index(report.PAPERS["he2024"])
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {reference.claim(ID).statement} |")]
    assert "| Table 2: 0.9 |" in line and "| 0.6 [0.431 to 0.769]; gpu, text, n = 3 | **holds** (03_quant) |" in line
    assert "| 1; gpu, text, n = 1 | **not testable**: 1 of 3 seeds (03_quant) |" in text
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "03_quant.ipynb").touch()
    assert "**holds** ([03_quant](notebooks/03_quant.ipynb))" in report.render(report.scoreboard(tmp_path), tmp_path)


def test_what_is_not_a_table_of_verdicts_is_refused(tmp_path):
    path = save(tmp_path, [reference.compare("it saves", [0.5], 0.25, "none", id=ID)])
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="json beside it is not readable; execute 03_quant again"):
        report.scoreboard(tmp_path)
    path.with_suffix(".json").write_text('{"scale": "tiny"}')
    pd.read_csv(path).drop(columns="values").to_csv(path, index=False)
    with pytest.raises(UserError, match="has no column values; execute 03_quant again"):
        report.scoreboard(tmp_path)


def test_the_text_around_the_markers_stays():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.insert(text, "new")
    assert new == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n" and report.insert(new, "new") == new
    for broken in ("no markers", f"{report.END} {report.BEGIN}", text + text):
        with pytest.raises(UserError, match="needs the markers"):
            report.insert(broken, "new")


def test_the_command_writes_the_readme_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.params, "root", lambda: tmp_path)
    with pytest.raises(UserError, match="cannot read .*README.md"):
        report.main([])
    (tmp_path / "README.md").write_text(f"# Title\n{report.BEGIN}{report.END}\n")
    report.main([])
    report.main([])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("README.md changed: On models") and second.startswith("README.md unchanged: On models")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    with pytest.raises(UserError, match="no arguments are known, got --root x"):
        report.main(["--root", "x"])
    report.main(["--help"])
    assert "python -m ofutils.report" in capsys.readouterr().out


def test_the_answer_counts_claims_and_comparisons_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(report.params, "root", lambda: tmp_path)
    with pytest.raises(UserError, match="figures/03_quant: .*verdicts.json.*; execute 03_quant again"):
        report.answer("03_quant")
    beside = [reference.compare(f"ours {n}", [n, n, n], 1.5, reference.NO_NUMBER) for n in (1.0, 2.0)]
    save(tmp_path, [reference.compare("it saves", [0.5, 0.6, 0.7], 0.4, "none", id=ID), *beside])
    said = "Scale gpu: of 1 claim, 1 holds; beside them of 2 comparisons, 1 holds, 1 does not hold."
    assert report.answer("03_quant") == said


def test_recorded_tables_are_of_one_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(report.params, "root", lambda: tmp_path)
    folder = tmp_path / "figures" / "03_quant"
    folder.mkdir(parents=True)
    for name, scale in (("one", "small"), ("two", "small"), ("other", "gpu")):
        (folder / f"{name}.json").write_text(json.dumps({"scale": scale, "model": name}))
        pd.DataFrame({"x": [name]}).to_csv(folder / f"{name}.csv", index=False)
    about, *tables = report.recorded("03_quant", "one", "two")
    assert about == {"scale": "small", "model": "one"} and [t["x"].item() for t in tables] == ["one", "two"]
    with pytest.raises(UserError, match="03_quant: one, other are of scales gpu and small"):
        report.recorded("03_quant", "one", "other")
