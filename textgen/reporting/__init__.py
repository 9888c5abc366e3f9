"""Pages, charts, comparisons and cards, made of what a run left.

- `report`: report.html of runs (report_page.html), and the loss curve
- `charts`: curves as points and ticks
- `compare`: a table of runs
- `profile`: where the time of profiled steps went
- `heatmap`: a page of texts, coloured by what their tokens cost (heatmap_page.html)
- `measures`: variety, repetition and copying of texts, as pure functions
- `card`: the model card
"""
