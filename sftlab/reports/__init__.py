"""Pages that people look at: what all pages share, and report.html of a run. The sweep's page is in sweeps/report/."""
