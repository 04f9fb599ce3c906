"""What an installation contains, and the names that it offers."""

import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

import deltajax

ROOT = Path(__file__).parent.parent


def test_wheel_holds_both_packages_and_nothing_generic(tmp_path):
    """A plain install adds no top-level name such as `experiments`, and has the C++ sources."""
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"deltajax", "pallas_kernels", f"deltajax-{deltajax.__version__}.dist-info"}
    sources = {path.name for path in (ROOT / "pallas_kernels").rglob("*") if path.suffix in (".cc", ".h")}
    assert sources and sources <= {Path(name).name for name in names}


def test_public_names():
    """`import deltajax` offers the operations, without loading JAX before they are used."""
    code = (
        "import sys, deltajax; assert 'jax' not in sys.modules; deltajax.delta_rule; assert 'jax' in sys.modules; "
        "from deltajax import delta_product, delta_product_step; import deltajax.ops as ops; "
        "assert delta_product is ops.delta_product and set(deltajax.__all__) <= set(dir(deltajax)); print(deltajax.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == deltajax.__version__, done.stderr
