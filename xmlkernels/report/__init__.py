"""The report of a run: `report.html` in its folder, made of the files that are there alone.

`run.py` reads them, `numbers.py` computes, `charts.py` draws, `background.py` and `results.py`
word each part, and `page.py` puts them into `page.html`. Nothing is fetched from elsewhere, and
nothing in the page runs: it is one file of HTML, CSS and SVG, for ever.
"""
