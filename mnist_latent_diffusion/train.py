"""Train a diffusion model on the latents of a trained autoencoder (latent diffusion, Rombach et al. 2022)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.args import AUTO, Args, Parser, number
from common.autoencoder import build_autoencoder, choose_autoencoder, describe, read_named_autoencoder
from common.data import make_mnist_loader, split_train_val
from common.drawing import preview_and_scored
from common.error_codes import run_main
from common.flags import add_diffusion_arguments, add_training_arguments, check_betas
from common.modules import module_of, named, network_file
from common.scores import epoch_scorer
from common.start import open_session

LABEL_DROPOUT = 0.3  # how often the denoiser does not see the label, so that it can also draw without one


def parse_args(argv: list[str] | None = None) -> Args:
    """This trainer's flags; what only the autoencoder knows is AUTO until it is chosen."""
    parser = Parser("Train latent diffusion on MNIST.", "python train.py --epochs 30 --generate-images")
    parser.flag(
        "input", "--ae-ckpt", metavar="PATH", help="autoencoder checkpoint, or a folder of a run or of runs (newest)"
    )
    parser.flag("input", "--ae-ckpt-dir", metavar="DIR", help="choose an autoencoder in this folder")
    parser.flag("shape", "--hidden-dim", type=number(int, 1), default=256, help="denoiser width (default: 256)")
    add_diffusion_arguments(parser)
    add_training_arguments(parser, epochs=30, lr_scheduler="cosine")
    args = parser.parse(argv)
    check_betas(parser, args)
    network_file("lddpm", args.network)
    if args.ae_ckpt and args.ae_ckpt_dir:
        parser.error("--ae-ckpt names an autoencoder: leave out --ae-ckpt-dir, where one would be chosen")
    args.derive(model="lddpm", ae_model=AUTO, ae_latent_dim=AUTO, ae_only_digit=AUTO, ae_weights=AUTO)
    if not args.given("only_digit"):  # then it is the autoencoder's
        args.only_digit, args.follows = AUTO, {"only_digit": "ae_only_digit"}
    return args


def experiment_name(args: Args) -> str:
    """The run's name up to its timestamp."""
    digit = "all" if args.only_digit is None else args.only_digit
    return (
        f"{named('lddpm', args.network)}-E{args.ae_model}-d{digit}-bs{args.batch_size}-lr{args.lr:g}"
        f"-D{args.ae_latent_dim}-T{args.T}-seed{args.seed}"
    )


def encode(autoencoder, digits, device):
    """All digits as latents: (z (N, D) float32, labels (N,)) on `device`."""
    import torch

    digits = digits.to(device)
    batches = make_mnist_loader(digits, 1000, shuffle=False, device=device)
    with torch.no_grad():
        return torch.cat([autoencoder.encode(images) for images, _ in batches]), digits.labels


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    finding = {"identify": read_named_autoencoder, "settle": choose_autoencoder}
    with open_session(args, experiment_name, models=("lddpm",), **finding) as session:
        import torch
        from torch.utils.data import TensorDataset

        from common.diffusion import epsilon_loss, loss_draws, schedules_of, takes_labels, timestep_distribution

        model = module_of(args.model)

        # The frozen autoencoder: from the checkpoint when resuming, so that moved files change nothing
        ae_data = session.resumed["ae_ckpt_data"] if session.resumed else args.inputs["autoencoder"]
        session.log.info(f"autoencoder: {describe(ae_data)}")
        session.extras["ae_ckpt_data"] = ae_data
        autoencoder = build_autoencoder(ae_data, session.device)

        # Data: latents, encoded once and standardised
        digits = session.digits()
        train_set, val_set = (
            TensorDataset(*(tensor.to(session.data_device) for tensor in encode(autoencoder, part, session.device)))
            for part in split_train_val(digits, args.seed)
        )
        z = train_set.tensors[0]
        std, mean = torch.std_mean(z, dim=0)  # (D,), (D,)
        std = torch.where(std > 0, std, 1)  # of images that are all alike
        train = session.loader(train_set, args.batch_size)
        val = session.loader(val_set, 1000, shuffle=False)

        latent_statistics = {"latent/mean": mean.mean().item(), "latent/std": std.mean().item()}

        # Model
        schedules = schedules_of(args.flags(), session.device, session.log.warning)
        net = model.build(args.flags(), schedules, typed=args.typed("hidden_dim"))
        args.derive(labelled=takes_labels(net))
        net.latent_mean.copy_(mean)
        net.latent_std.copy_(std)
        session.attach(net, steps_per_epoch=len(train), warmup=200, ema=0.9995, weight_decay=0.0)

        timesteps = timestep_distribution(schedules)

        def draws_of(batch, rng):
            z, _ = batch
            return loss_draws(z.shape, timesteps, rng, LABEL_DROPOUT)

        def loss_of(net, batch, draws):
            z, labels = batch
            return epsilon_loss(net, net.standardise(z), labels, schedules, draws, args.min_snr_gamma)

        def draw(**what):
            return model.generate_images(
                session.averaged_net, autoencoder, schedules, seed=args.seed, callback=session.poll, **what
            )

        preview, scored = preview_and_scored(args, draw)
        scored_epoch = epoch_scorer(session, scored)

        # Training
        for _ in session.epochs():
            for batch in session.batches(train):
                session.step(loss_of, batch, draws_of)
            val_loss = session.validate(val, loss_of, draws_of)
            session.end_epoch(val_loss, preview, latent_statistics | scored_epoch())


if __name__ == "__main__":
    sys.exit(run_main(main))
