from benchmarks.damage import campaign


def test_a_damaged_run_is_never_taken_up_wrongly():
    faults = []
    counts = campaign(100, seed=2, told=faults.append)
    assert not faults
    assert min(counts["unharmed"], counts["the one before"], counts["refused"]) > 10
    assert sum(counts.values()) == 100
