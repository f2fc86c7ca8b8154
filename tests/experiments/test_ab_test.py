import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.ab_test import main
from serving.ab_routing import Routing

ROOT = Path(__file__).parents[2]


def write_test(folder, *, users=400, share=0.5, lift=0.0, more=(), seed=0):
    """Write a test in which every user searches 3 times, sees 5 products and may click.

    ``more`` holds exposures that are added.
    """
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    routing = Routing(salt="test", treatment_share=share)
    exposures, outcomes = [], []
    for user in range(users):
        bucket = routing.bucket(user)
        rate = rng.beta(2, 8) * (1 + lift * (bucket == "treatment"))
        for search in range(3):
            request = f"{user}-{search}"
            exposures.append(exposure(request, user, bucket))
            for product in range(5):
                clicked = rng.random() < rate
                converted = clicked and rng.random() < 0.3
                outcomes.append(
                    {
                        "request_id": request,
                        "product_id": product,
                        "clicked": clicked,
                        "converted": converted,
                        "revenue": 2.0 * converted,
                    }
                )
    (folder / "exposures.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*exposures, *more])
    )
    pq.write_table(pa.Table.from_pylist(outcomes), folder / "outcomes.parquet")
    return [
        *("--exposures", str(folder / "exposures.jsonl")),
        *("--outcomes", str(folder / "outcomes.parquet")),
        *("--output", str(folder / "out")),
    ]


def exposure(request, user, bucket):
    return {
        "request_id": request,
        "time": "2024-08-01T09:00:00+00:00",
        "user_id": user,
        "bucket": bucket,
        "model": f"ranker of {bucket}",
        "candidates": [4, 3, 2, 1, 0],
        "probabilities": [0.5, 0.4, 0.3, 0.2, 0.1],
    }


def result(folder):
    return json.loads((folder / "out" / "ab_test.json").read_text())


def test_a_test_checked_by_hand(tmp_path, capsys):
    # Users 1 and 2 in control see 5 products each and click 1 and 3, users 3 and 4 in treatment
    # click 2 and 4: 4/10 against 6/10.
    users = {1: ("control", 1), 2: ("control", 3), 3: ("treatment", 2), 4: ("treatment", 4)}
    lines = [exposure(str(user), user, bucket) for user, (bucket, _) in users.items()]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcomes = {
        "request_id": [str(user) for user, (_, clicks) in users.items() for _ in range(clicks)],
        "product_id": [place for _, clicks in users.values() for place in range(clicks)],
        "clicked": [True] * 10,
    }
    pq.write_table(pa.table(outcomes), tmp_path / "outcomes.parquet")
    paths = {"exposures": "log.jsonl", "outcomes": "outcomes.parquet", "output": "out"}
    assert main([w for k, v in paths.items() for w in (f"--{k}", str(tmp_path / v))]) == 0
    (metric,) = result(tmp_path)["metrics"]
    assert metric["name"] == "click_through_rate"
    assert metric["control"] == {"value": 0.4, "numerator": 4, "denominator": 10}
    assert metric["treatment"] == {"value": 0.6, "numerator": 6, "denominator": 10}
    assert metric["absolute_lift"]["value"] == pytest.approx(0.2)
    assert metric["relative_lift"]["value"] == pytest.approx(0.5)
    # Deviations -1, 1 in both: variances 2 * 2 / 100; 2 degrees of freedom, quantile 4.3027
    margin = 4.3027 * 0.08**0.5
    interval = pytest.approx([0.2 - margin, 0.2 + margin], abs=1e-4)
    assert metric["absolute_lift"]["interval"] == interval
    assert "+50.00%" in capsys.readouterr().out


def test_the_command_writes_json_markdown_and_tables(tmp_path, capsys):
    arguments = write_test(tmp_path, users=1500, lift=0.5)
    assert main([*arguments, "--plan-lift", "0.05"]) == 0
    found = result(tmp_path)
    assert [metric["name"] for metric in found["metrics"]] == [
        *("click_through_rate", "conversion_rate", "conversions_per_impression"),
        *("revenue_per_user", "revenue_per_impression"),
    ]
    by_name = {metric["name"]: metric for metric in found["metrics"]}
    rate = by_name["click_through_rate"]
    low, high = rate["relative_lift"]["interval"]
    assert 0 < low < 0.5 < high
    assert rate["p_value"] < 1e-6
    low, high = by_name["conversion_rate"]["relative_lift"]["interval"]
    assert low < 0 < high  # a click is worth the same in both
    for bucket in ("control", "treatment"):  # the two rates multiply
        values = {name: metric[bucket]["value"] for name, metric in by_name.items()}
        product = values["click_through_rate"] * values["conversion_rate"]
        assert values["conversions_per_impression"] == pytest.approx(product)
        assert values["revenue_per_user"] == pytest.approx(15 * values["revenue_per_impression"])
    assert rate["users_needed"] > 1500
    assert rate["detectable_lift"] < 0.5
    assert found["plan_lift"] == 0.05
    assert sum(found["users"].values()) == 1500
    assert found["warnings"] == []
    assert (
        found["command"] == f"python -m experiments.ab_test {' '.join(arguments)} --plan-lift 0.05"
    )

    printed, markdown = capsys.readouterr().out, (tmp_path / "out" / "ab_test.md").read_text()
    lift = f"{rate['relative_lift']['value']:+.2%}"
    for text in (printed, markdown):
        assert lift in text
        assert "users to see +5.0%" in text
        assert f"{rate['users_needed']:,}" in text
    assert "WARNING" not in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("ab_test.json", "ab_test.md")
    ]


def test_figures_are_those_of_the_files(tmp_path):
    main(write_test(tmp_path, lift=0.3, seed=4))
    outcomes = pq.read_table(tmp_path / "outcomes.parquet").to_pandas()
    routing = Routing(salt="test", treatment_share=0.5)
    outcomes["user"] = outcomes["request_id"].str.split("-").str[0].astype(int)
    outcomes["bucket"] = outcomes["user"].map(routing.bucket)
    for metric in result(tmp_path)["metrics"]:
        for bucket, rows in outcomes.groupby("bucket"):
            expected = {
                "click_through_rate": rows["clicked"].mean(),
                "conversion_rate": rows["converted"].sum() / rows["clicked"].sum(),
                "conversions_per_impression": rows["converted"].mean(),
                "revenue_per_user": rows.groupby("user")["revenue"].sum().mean(),
                "revenue_per_impression": rows["revenue"].mean(),
            }
            assert metric[bucket]["value"] == pytest.approx(expected[metric["name"]])


def test_a_sample_ratio_mismatch_is_loud(tmp_path, capsys):
    arguments = write_test(tmp_path, share=0.35)
    assert main(arguments) == 0
    found = result(tmp_path)
    assert found["sample_ratio"]["mismatch"]
    assert found["sample_ratio"]["p_value"] < 0.001
    printed, markdown = capsys.readouterr().out, (tmp_path / "out" / "ab_test.md").read_text()
    assert "WARNING: SAMPLE RATIO MISMATCH" in printed
    assert "> **Warning.** SAMPLE RATIO MISMATCH" in markdown
    assert main([*arguments, "--treatment-share", "0.35"]) == 0
    assert not result(tmp_path)["sample_ratio"]["mismatch"]


def test_the_sample_ratio_is_of_users_not_of_rows(tmp_path):
    # One user who searches as much as all others together moves no user.
    many = [
        exposure(f"bot-{n}", 1, Routing(salt="test", treatment_share=0.5).bucket(1))
        for n in range(1200)
    ]
    main(write_test(tmp_path, more=many))
    assert result(tmp_path)["sample_ratio"]["p_value"] > 0.01
    assert sum(result(tmp_path)["users"].values()) == 400


def test_doubts_are_told(tmp_path, capsys):
    routing = Routing(salt="test", treatment_share=0.5)
    moved = {"control": "treatment", "treatment": "control"}[routing.bucket(5)]
    swapped = exposure("swap", 6, routing.bucket(6)) | {"model": "newer"}
    assert main(write_test(tmp_path, more=[exposure("moved", 5, moved), swapped])) == 0
    warnings = result(tmp_path)["warnings"]
    assert warnings[0].startswith("1 users met both buckets")
    assert warnings[1] == f"2 rankers served the {routing.bucket(6)} bucket."
    printed = capsys.readouterr().out
    assert all(f"WARNING: {warning}" in printed for warning in warnings)

    same = [
        exposure(f"same-{user}", user, bucket) | {"model": "one"}
        for user in (7, 8, 9, 10)
        for bucket in [routing.bucket(user)]
    ]
    main(write_test(tmp_path, more=same))
    assert (
        "The same ranker served both buckets: this is an A/A test."
        in (result(tmp_path)["warnings"])
    )


def test_lost_exposures_are_told(tmp_path):
    arguments = write_test(tmp_path)
    log = tmp_path / "exposures.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[60:]))
    main(arguments)
    (warning,) = result(tmp_path)["warnings"]
    assert "outcomes belong to no exposure; exposures may be missing" in warning


def test_without_clicks_there_is_no_conversion_rate(tmp_path, capsys):
    arguments = write_test(tmp_path, users=20)
    nothing = {"request_id": ["none"], "product_id": [1], "clicked": [False], "converted": [False]}
    pq.write_table(pa.table(nothing), tmp_path / "outcomes.parquet")
    assert main(arguments) == 0
    by_name = {metric["name"]: metric for metric in result(tmp_path)["metrics"]}
    assert by_name["conversion_rate"]["control"] is None
    assert by_name["click_through_rate"]["relative_lift"] == {"value": None, "interval": None}
    assert by_name["click_through_rate"]["p_value"] == 1
    assert "Conversion rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--treatment-share", "1"], "--treatment-share must be between 0 and 1, got 1.0"),
        (["--plan-lift", "0"], "--plan-lift must be above -1 and other than 0, got 0.0"),
        (["--plan-lift", "nan"], "--plan-lift must be above -1 and other than 0, got nan"),
        (["--shown", "0"], "--shown must be 1 or more, got 0"),
        (["--outcomes", "nowhere"], "nowhere: no such file or folder of Parquet files"),
        (["--exposures", "nowhere"], "nowhere: no such file or folder of exposures"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, change, sentence):
    arguments = write_test(tmp_path, users=4)
    assert main([*arguments, *change]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_test_needs_both_buckets(tmp_path, capsys):
    assert main(write_test(tmp_path, users=4, share=0.0)) == 2
    assert "the exposures hold no user of treatment alone" in capsys.readouterr().err


def test_help_needs_nothing_heavy():
    program = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from experiments.ab_test import main\n"
        "try: main()\n"
        "except SystemExit: print({'duckdb', 'torch', 'scipy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--plan-lift" in done.stdout
    assert done.stderr.strip() == "set()"
