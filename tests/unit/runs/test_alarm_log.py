from tensafe_nb.runs.alarm_log import AlarmLog, Finding, Level


def heard(log: AlarmLog, *levels: Level | None) -> list[str | None]:
    """Return which level is announced at each step; None where nothing is."""
    told = []
    for step, level in enumerate(levels):
        found = [] if level is None else [Finding("kl", level, "It moved far.", "Slow down.")]
        alarms = log.announce("tc-1/1", step, found)
        told.append(alarms[0].level if alarms else None)
    return told


def test_a_trouble_that_lasts_is_said_once() -> None:
    assert heard(AlarmLog(2), "amber", "amber", None, "amber") == ["amber", None, None, None]


def test_a_trouble_is_said_anew_after_it_was_over() -> None:
    assert heard(AlarmLog(2), "amber", None, None, "amber") == ["amber", None, None, "amber"]


def test_a_level_rises_at_once_and_falls_after_a_quiet_time() -> None:
    assert heard(AlarmLog(2), "amber", "red", "amber", "amber", "red") == [
        "amber",
        "red",
        None,
        "amber",
        "red",
    ]


def test_what_is_forgotten_is_said_anew() -> None:
    log = AlarmLog(5)
    heard(log, "red")
    log.forget(["kl"])
    assert heard(log, "red") == ["red"]
    log.forget()
    assert heard(log, "red") == ["red"]


def test_an_alarm_says_of_which_run_step_and_rollouts_it_is() -> None:
    (alarm,) = AlarmLog(5).announce(
        "tc-1/1", 7, [Finding("kl", "red", "It moved far.", "Slow down.", (3, 5))]
    )
    assert (alarm.run_id, alarm.step, alarm.name, alarm.rollouts) == ("tc-1/1", 7, "kl", (3, 5))
    assert (alarm.message, alarm.remedy) == ("It moved far.", "Slow down.")
