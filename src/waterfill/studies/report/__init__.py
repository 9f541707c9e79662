"""One page about one artifact: what it is, where its bytes went, what they cost, and how to come by the same.

gather(artifact, plan, config, …) -> Report (plain data) -> render -> HTML

    facts.py     everything that the page says
    bound.py     Shannon's bound for one matrix, and for a whole budget
    places.py    layer, kind and colour of each matrix
    svg.py       drawings that keep their text readable at any width
    charts.py    one function per chart
    page.py      the page from its template
"""

from waterfill.studies.report.facts import BoundPoint, Continuation, Report, gather
from waterfill.studies.report.page import render

__all__ = ["BoundPoint", "Continuation", "Report", "gather", "render"]
