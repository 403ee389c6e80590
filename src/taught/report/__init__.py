"""What a run says, as one HTML page (``html``) and in the terminal (``terminal``, ``show``).

    run folder -> tables -> sections, each a list of blocks -> HTML, terminal

Nothing here computes attribution; a missing table makes a section say which command writes it.
"""
