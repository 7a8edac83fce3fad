"""Machine code without a GPU: what a kernel takes is read right, and a budget can be broken."""

import dataclasses

import pytest

triton = pytest.importorskip("triton")

import small_kernels  # noqa: E402

from bench import compile as compiling  # noqa: E402
from bench import sass  # noqa: E402

RULES = compiling.budgets()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before, compiling.CACHE = compiling.CACHE, tmp_path_factory.mktemp("cache")
    yield
    compiling.CACHE = before


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in small_kernels.compile_cases()}


@pytest.mark.parametrize("arch,instruction", [(80, "hmma"), (90, "hgmma")])
def test_a_product_uses_the_tensor_cores_of_its_architecture(cases, arch, instruction):
    report = compiling.report_triton(cases["product"], arch)
    assert compiling.violations(report, RULES) == []
    assert report.counts[instruction] > 0
    assert 0 < report.registers <= 255 and report.shared > 0 and report.blocks >= 1
    assert report.wide_loads == 1.0
    assert (
        report.estimate["of"] == "tensor"
        and 0 < report.estimate["serial"] <= report.estimate["percent"] <= 100
    )


def test_a_report_is_kept_by_what_it_follows_from(cases, monkeypatch):
    first = compiling.report_triton(cases["product"], 90)
    monkeypatch.setattr(compiling, "tool", None)  # nothing is read again
    assert compiling.report_triton(cases["product"], 90) == first


def test_a_spill_is_found(cases):
    report = compiling.report_triton(cases["spills"], 90)
    assert report.spill_bytes > 0 and report.stack > 0 and report.counts["local"] > 0
    assert any("spill_bytes" in text for text in compiling.violations(report, RULES))


def test_products_that_wait_for_one_another_are_found(cases):
    """As 512 accumulators a thread do not fit, the assembler lets no two products be under way."""
    report = compiling.report_triton(cases["spills"], 90)
    assert any("waits for the one before" in text for text in compiling.violations(report, RULES))


def test_a_product_on_the_slow_path_is_found(cases):
    report = compiling.report_triton(cases["no tensor cores"], 90)
    assert report.counts["hgmma"] == 0
    assert any("no HGMMA" in text for text in compiling.violations(report, RULES))


def test_atomics_and_narrow_loads_are_found(cases):
    report = compiling.report_triton(cases["narrow and atomic"], 90)
    assert report.counts["atomics"] > 0 and report.wide_loads < 0.5
    rules = [*RULES, {"kernel": "narrow*", "wide_loads": 0.9, "why": "planted"}]
    broken = " ".join(compiling.violations(report, rules))
    assert "atomics" in broken and "16 bytes wide" in broken


def test_a_kernel_that_does_not_compile_is_a_violation(cases):
    case = dataclasses.replace(
        cases["product"], name="broken", constexprs={"BLOCK_M": 3, "BLOCK_N": 64, "BLOCK_K": 64}
    )
    report = compiling.report_triton(case, 90)
    assert report.failed
    assert "does not compile" in compiling.violations(report, RULES)[0]


def test_later_rules_overrule_earlier_ones():
    rules = [
        {"kernel": "*", "spill_bytes": 0, "registers": 255},
        {"kernel": "a*", "arch": [90], "spill_bytes": 48, "why": "measured"},
    ]
    limits = [
        compiling.budget_of(compiling.Report(name, arch, 4), rules)
        for name, arch in (("ab", 90), ("ab", 80), ("b", 90))
    ]
    assert [limit["spill_bytes"] for limit in limits] == [48, 0, 0]
    assert all(limit["registers"] == 255 for limit in limits)


def test_every_exception_to_the_budget_says_why():
    fields = {
        "kernel",
        "arch",
        "triton",
        "why",
        "registers",
        "spill_bytes",
        "stack",
        "shared",
        "blocks",
        "atomics",
    }
    for rule in (
        rule for version in compiling.known_versions() for rule in compiling.budgets(version=version)
    ):
        assert rule["kernel"] == "*" or rule["why"].strip()
        assert set(rule) <= fields | {"wide_loads", "tensor_core"}


@pytest.mark.parametrize(
    "arch,registers,shared,warps,blocks",
    [
        (90, 255, 200_000, 8, 1),  # shared memory alone
        (90, 128, 0, 8, 2),  # 65536 / (128 * 256)
        (90, 32, 0, 8, 8),  # 64 warps
        (80, 32, 0, 1, 32),  # 32 blocks
        (90, 64, 50_000, 4, 4),  # 228 KiB / 50 KB
        (90, 64, 240_000, 4, 0),  # more than a block may have
    ],
)
def test_occupancy_by_hand(arch, registers, shared, warps, blocks):
    assert sass.occupancy(arch, registers, shared, warps) == blocks


_SASS = """
\t\tFunction : k
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0010*/                   LDG.E R8, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x0 */
        /*0030*/              @P1  BRA 0x60 ;  /* 0x0 */
        /*0040*/                   MUFU.EX2 R3, R4 ;  /* 0x0 */
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0060*/              @!P0 BRA 0x20 ;  /* 0x0 */
        /*0070*/                   EXIT ;  /* 0x0 */
        /*0080*/                   BRA 0x80;  /* 0x0 */
"""


def test_the_disassembly_is_read_by_hand():
    (body,) = sass.functions(_SASS).values()
    counts = sass.count(body)
    assert (counts.instructions, counts.hgmma, counts.mufu) == (9, 1, 1)
    assert counts.loads == {16: 1, 4: 1} and counts.wide_loads == 0.5 and counts.stores == {8: 1}
    loop = sass.hot_loop(body)
    assert [hex(i.address) for i in loop] == ["0x20", "0x30", "0x40", "0x50", "0x60"]
    steady, once = sass.split_loop(loop)
    assert [i.base for i in once] == ["MUFU", "STG"] and len(steady) == 3
    assert sass.mma_flops(loop[0]) == 2 * 64 * 128 * 16 / 4
    guess = sass.estimate(90, body, warps=4, blocks=1, turns=8)
    # A tile: 8 turns of 64*128*16 products at 4096 operations a clock; then one exponential and one store a
    # thread, and what stands around the loop.
    assert guess.clocks["tensor"] == 8 * 2 * 64 * 128 * 16 / 4096
    assert guess.clocks["special functions"] == 4 * 32 / 16
    assert guess.clocks["issue"] == (8 * 3 + 2 + 4) * 4 / 4


def test_a_rule_of_one_version_of_triton_holds_for_it_alone(tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text(
        'triton = ["3.6", "3.9"]\n[[budget]]\nkernel = "*"\nspill_bytes = 0\n'
        '[[budget]]\nkernel = "a"\ntriton = "3.6"\nspill_bytes = 8\nwhy = "measured"\n'
    )
    assert compiling.known_versions(path) == ["3.6", "3.9"]
    report = compiling.Report("a", 90, 4)
    for version, spilled in (("3.6", 8), ("3.9", 0)):
        limits = compiling.budget_of(report, compiling.budgets(path, version))
        assert limits == {"spill_bytes": spilled}


@pytest.mark.skipif(
    compiling.triton_version() not in compiling.known_versions(),
    reason=f"the budgets are of Triton {compiling.known_versions()}",
)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_of_ours_keeps_its_budget(arch):
    compiling.CACHE = compiling.ROOT / "build" / "bench_compile"  # by hash, so kept from one run to the next
    reports = compiling.every_report([arch])
    assert reports
    broken = [text for report in reports for text in compiling.violations(report, RULES)]
    assert not broken, "\n".join(broken)
