"""Report: a run as one page; `page.page` is the way in."""
