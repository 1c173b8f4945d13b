"""One line of progress in place of a line of dots for every 72 tests."""

from __future__ import annotations

import pytest


class Progress:
    """A plugin that counts tests: in place on a terminal, and in a log by a mark at every tenth of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.done = self.failed = self.marks = 0

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No letter for a test that passed, or that was skipped, which the summary names; the others keep theirs."""
        if report.passed and report.when == "call":
            return "passed", "", ""
        return ("skipped", "", "") if report.skipped and not hasattr(report, "wasxfail") else None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test when it ends."""
        if report.failed:
            self.failed += 1
        if report.when != "teardown":
            return
        self.done += 1
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        total = max(terminal._session.testscollected, self.done)
        if terminal.isatty:
            failed = f", {self.failed} failed" if self.failed else ""
            terminal.rewrite(f"{self.done} of {total} tests{failed}", erase=True)
        elif self.done * 10 // total > self.marks:
            self.marks = self.done * 10 // total
            terminal.write(f"{10 * self.marks}% ", flush=True)
