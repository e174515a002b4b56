"""Train a diffusion model on pixels (DDPM, Ho et al. 2020): `python train.py --only-digit 5`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.args import Args, Parser, flag_of, number
from common.data import split_train_val
from common.drawing import preview_and_scored
from common.error_codes import run_main
from common.flags import add_diffusion_arguments, add_training_arguments, check_betas
from common.modules import module_of, named, network_file
from common.scores import epoch_scorer
from common.start import open_session

LABEL_DROPOUT = 0.1  # how often the denoiser does not see the label, so that it can also draw without one


def parse_args(argv: list[str] | None = None) -> Args:
    """This trainer's flags."""
    parser = Parser("Train pixel-space diffusion on MNIST.", "python train.py --only-digit 5 --generate-images")
    width = number(int, 8)
    parser.flag("shape", "--base-ch", type=width, default=24, help="U-Net width, a multiple of 8 (default: 24)")
    fine = "width of the block at full resolution, a multiple of 8; 0: none (default: 8)"
    parser.flag("shape", "--fine-ch", type=number(int, 0), default=8, help=fine)
    dense = "width of a layer that sees all positions of 7 x 7 at once; 0: none (default: 512)"
    parser.flag("shape", "--dense-dim", type=number(int, 0), default=512, help=dense)
    attention = "attend from all positions of 7 x 7 to all, too (default: yes)"
    parser.flag("shape", "--attention", action=argparse.BooleanOptionalAction, default=True, help=attention)
    add_diffusion_arguments(parser)
    add_training_arguments(parser, epochs=30, workers=4)
    args = parser.parse(argv)
    check_betas(parser, args)
    for name in ("base_ch", "fine_ch"):
        if getattr(args, name) % 8:
            parser.error(f"{flag_of(name)} {getattr(args, name)} is not a multiple of 8")
    args.derive(model="ddpm")
    network_file(args.model, args.network)
    return args


def experiment_name(args: Args) -> str:
    """The run's name up to its timestamp."""
    digit = "all" if args.only_digit is None else args.only_digit
    return f"{named('ddpm', args.network)}-d{digit}-bs{args.batch_size}-lr{args.lr:g}-T{args.T}-seed{args.seed}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with open_session(args, experiment_name, models=("ddpm",)) as session:
        from common.diffusion import epsilon_loss, loss_draws, schedules_of, takes_labels, uniform_timesteps

        model = module_of(args.model)

        # Data
        digits = session.digits()
        train_set, val_set = (part.to(session.data_device) for part in split_train_val(digits, args.seed))
        train = session.loader(train_set, args.batch_size)
        val = session.loader(val_set, args.batch_size, shuffle=False)

        # Model
        schedules = schedules_of(args.flags(), session.device, session.log.warning)
        net = model.build(args.flags(), schedules, typed=args.typed(*model.PARTS))
        args.derive(labelled=takes_labels(net))
        session.attach(net, steps_per_epoch=len(train), warmup=100, ema=0.999, weight_decay=0.0)

        timesteps = uniform_timesteps(schedules)

        def draws_of(batch, rng):
            images, _ = batch
            return loss_draws(images.shape, timesteps, rng, LABEL_DROPOUT)

        def loss_of(net, batch, draws):
            images, labels = batch
            return epsilon_loss(net, 2 * images - 1, labels, schedules, draws, args.min_snr_gamma)

        def draw(**what):
            return model.generate_images(session.averaged_net, schedules, seed=args.seed, callback=session.poll, **what)

        preview, scored = preview_and_scored(args, draw)
        scored_epoch = epoch_scorer(session, scored)

        # Training
        for _ in session.epochs():
            for batch in session.batches(train):
                session.step(loss_of, batch, draws_of)
            val_loss = session.validate(val, loss_of, draws_of)
            session.end_epoch(val_loss, preview, scored_epoch())


if __name__ == "__main__":
    sys.exit(run_main(main))
