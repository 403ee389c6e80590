"""What a run says, as one HTML page (``build``) and in the terminal (``show``).

    run folder -> view (tables by id) -> verdict, charts -> build (HTML), show (terminal)

Nothing here computes attribution; a missing file makes a section say which command writes it.
"""
