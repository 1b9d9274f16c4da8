"""What people look at: `drawing` boxes on images, `plots` of results.

Every function returns a PIL image; `drawing.save_image` writes it. matplotlib is used here alone, without pyplot's
global state.
"""
