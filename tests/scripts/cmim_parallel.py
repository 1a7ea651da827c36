"""As many scripts of binary networks are: nn.DataParallel whatever the machine, one function for training and
validation, SGD with steps, resume."""

import argparse
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cmim_plugin import CMIM
from models import resnet

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--save", default="checkpoint.pt")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()


class AverageMeter:
    def __init__(self):
        self.sum = self.count = 0

    def update(self, value, n):
        self.sum += value * n
        self.count += n
        self.avg = self.sum / self.count


def forward(loader, model, criterion, training, optimizer=None):
    losses, top1 = AverageMeter(), AverageMeter()
    for images, target in loader:
        images, target = images.to(device), target.to(device)
        with torch.set_grad_enabled(training):
            output = model(images)
            loss = criterion(output, target)
        losses.update(loss.item(), len(images))
        top1.update((output.argmax(1) == target).float().mean().item(), len(images))
        if training:
            optimizer.zero_grad()
            (loss + cmim(model)).backward()
            optimizer.step()
    return losses.avg, top1.avg


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# Random images in place of CIFAR-10's.
data = TensorDataset(torch.randn(48, 3, 32, 32), torch.randint(10, (48,)))
train_set, val_set = torch.utils.data.random_split(data, [32, 16])
train_loader = DataLoader(train_set, args.batch_size, shuffle=True)
val_loader = DataLoader(val_set, args.batch_size)

model = nn.DataParallel(resnet()).to(device)
cmim = CMIM(model, torch.zeros(2, 3, 32, 32, device=device))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.1)

start = 0
if args.resume and os.path.exists(args.save):
    checkpoint = torch.load(args.save)
    start = checkpoint["epoch"]
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])

for epoch in range(start, args.epochs):
    model.train()
    loss, accuracy = forward(train_loader, model, criterion, True, optimizer)
    scheduler.step()
    model.eval()
    val_loss, val_accuracy = forward(val_loader, model, criterion, False)
    print(f"epoch {epoch}: loss {loss!r} accuracy {accuracy!r} val loss {val_loss!r} accuracy {val_accuracy!r}")
    torch.save(
        {
            "epoch": epoch + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        args.save,
    )
