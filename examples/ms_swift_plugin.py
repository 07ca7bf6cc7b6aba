"""ms-swift's GRPO with APPO's token weights.

pip install 'appo[swift]'
swift rlhf --rlhf_type grpo --external_plugins examples/ms_swift_plugin.py --reward_funcs accuracy ...
"""

from appo.config import APPOConfig
from appo.integrations import ms_swift

ms_swift.use(APPOConfig(strategy="soft", top_frames=3), accuracy=None)  # the first reward says what is right
