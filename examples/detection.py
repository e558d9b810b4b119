"""A detector of torchvision with the head as its box predictor, trained on drawn squares: most orange, few cyan.

The head direction takes in foreground boxes alone, and at inference the background keeps its probability (Eq. 9).
Expect squares of the rarer hues to be named right more often with TDE.
"""

from __future__ import annotations

import argparse

import torch
from drawn_squares import Target, scenes
from long_tail import Table
from tde_trainer.detection import replace_box_predictor
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import Conv2dNormActivation, box_iou

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
COUNTS = torch.tensor([0, 160, 80, 40, 19, 9, 4])  # training squares of each class; class 0 is the background


def named(model: nn.Module, images: list[tuple[Tensor, Target]], alpha: float) -> tuple[Tensor, Tensor]:
    """The class ``[N]`` of the best detection over each square, 0 where there is none, and the true one."""
    model.roi_heads.box_predictor.head.alpha = alpha
    found, true = [], []
    for image, target in images:
        (detected,) = model([image])  # by falling score
        over = box_iou(target["boxes"], detected["boxes"]) > 0.5
        for hits in over:
            found.append(detected["labels"][hits][0] if hits.any() else torch.tensor(0))
        true.append(target["labels"])
    return torch.stack(found), torch.cat(true)


torch.manual_seed(arguments.seed)
training, validation, test = scenes(COUNTS), scenes(10 * COUNTS.sign()), scenes(20 * COUNTS.sign())
backbone = nn.Sequential(*(Conv2dNormActivation(a, b, stride=2) for a, b in ((3, 16), (16, 32), (32, 64))))
backbone.out_channels = 64
model = FasterRCNN(
    backbone,
    min_size=64,
    max_size=64,
    rpn_anchor_generator=AnchorGenerator(((12, 18, 24),), ((1.0,),)),
    rpn_post_nms_top_n_train=100,
    rpn_post_nms_top_n_test=50,
    box_head=TwoMLPHead(64 * 7**2, 128),
    box_predictor=FastRCNNPredictor(128, len(COUNTS)),
    box_batch_size_per_image=32,
)
replace_box_predictor(model, num_heads=2, tau=16, gamma=1 / 32)  # the one line that is not torchvision's

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
for _ in range(arguments.steps):
    images, targets = zip(*(training[i] for i in torch.randint(len(training), (arguments.batch_size,))), strict=True)
    optimizer.zero_grad()
    sum(model(list(images), list(targets)).values()).backward()
    optimizer.step()
    schedule.step()

model.eval()
with torch.no_grad():

    def score(alpha: float) -> float:
        """Accuracy on validation images, whose hues are equally many."""
        found, true = named(model, validation, alpha)
        return float((found == true).float().mean())

    alpha = max((0.0, 0.5, 1.0, 1.5, 2.0), key=score)
    table = Table()
    for name, strength in (("without TDE", 0.0), (f"with TDE, alpha {alpha}", alpha)):
        found, true = named(model, test, strength)
        table.add(name, found, true, COUNTS)
table.show()
