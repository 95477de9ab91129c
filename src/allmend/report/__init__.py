"""The report of a run: one self-contained HTML page, `allmend.report.page.write_report`."""
