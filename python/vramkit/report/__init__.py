"""What a person looks at: HTML tables and pages (`html`), and matplotlib figures (`plots`).

`layout` holds what both share: the colours of formats, the grouping of many layers into few rows,
the thinning of long timelines. `charts` draws the pictures of a page.
"""
