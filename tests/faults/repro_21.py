"""`detect` of a folder leaves out, without a word: broken links, linked folders, folders it may not read, .jfif files.

README: "`detect` skips files that cannot be read …, says which and why, and ends with status 1."
Right: name them as skipped (a broken .jpg link is a file that cannot be read), or follow links to folders; mention how
many files of other endings were passed over.
"""

from PIL import Image
from product import ROOT, make_run, picture, sppnet, verdict

run, photos, more = make_run(ROOT / "run"), ROOT / "photos", ROOT / "elsewhere"
photos.mkdir()
more.mkdir()
Image.fromarray(picture(0)).save(photos / "ok.jpg")
Image.fromarray(picture(1)).save(more / "linked.jpg")
Image.fromarray(picture(2)).save(photos / "chrome.jfif", "JPEG")  # what Windows calls a JPEG from the web
(photos / "gone.jpg").symlink_to(ROOT / "nowhere.jpg")
(photos / "more").symlink_to(more)
status, out, err = sppnet("detect", run, "photos", "--out", "found", "--threshold", "-100")
print(f"$ sppnet detect run photos --out found -> {status}\n{out}{err}")
silent = [name for name in ("gone.jpg", "more", "chrome.jfif") if name not in out + err]
verdict(status == 0 and bool(silent), f"1 of 4 searched, exit {status}; never mentioned: {', '.join(silent)}")
