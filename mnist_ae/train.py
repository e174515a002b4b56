"""Train an autoencoder on MNIST: `python train.py --model mlp` or `--model conv`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.args import AUTO, Args, Parser, number
from common.data import split_train_val
from common.error_codes import NO_MODEL_SPECIFIED, Exit, run_main
from common.flags import add_training_arguments
from common.images import over
from common.modules import module_of
from common.scores import epoch_scorer
from common.start import open_session

MODELS = {AUTO: AUTO, "mlp": "ae-mlp", "conv": "ae-conv", "ae-mlp": "ae-mlp", "ae-conv": "ae-conv"}
LATENT_NOISE = 0.05  # deviation of the noise on latents in training; their own is 1.2 to 1.5
LATENT_PULL = 2e-4
ABSOLUTE = 0.3  # weight of the absolute error: it is what keeps strokes crisp
PREVIEW_DIGITS = 32
SOME = 1000  # validation digits for the figures of each epoch


def parse_args(argv: list[str] | None = None) -> Args:
    """This trainer's flags."""
    parser = Parser("Train an autoencoder on MNIST.", "python train.py --model mlp --epochs 25 --generate-images")
    model_help = "mlp or conv (required for a new run)"
    parser.flag("shape", "--model", type=_model, default=AUTO, metavar="mlp|conv", help=model_help)
    parser.flag("shape", "--latent-dim", type=number(int, 1), default=16, help="latent dimension (default: 16)")
    add_training_arguments(parser, epochs=25, lr_scheduler="cosine")
    return parser.parse(argv)


def _model(text: str) -> str:
    if text not in MODELS:
        raise Exit(NO_MODEL_SPECIFIED, f"--model {text}: no such model; choose --model mlp or --model conv")
    return MODELS[text]


def experiment_name(args: Args) -> str:
    """The run's name up to its timestamp."""
    digit = "all" if args.only_digit is None else args.only_digit
    return f"{args.model}-d{digit}-bs{args.batch_size}-lr{args.lr:g}-D{args.latent_dim}-seed{args.seed}"


def require_model(args: Args) -> None:
    """--model may only be missing where a checkpoint is resumed."""
    if args.model == AUTO:
        raise Exit(NO_MODEL_SPECIFIED, "no --model given; choose --model mlp or --model conv")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with open_session(args, experiment_name, models=("ae-mlp", "ae-conv"), settle=require_model) as session:
        import torch
        from torch.nn.functional import l1_loss, mse_loss

        # Data
        digits = session.digits()
        train_set, val_set = (part.to(session.data_device) for part in split_train_val(digits, args.seed))
        train = session.loader(train_set, args.batch_size)
        val = session.loader(val_set, 1000, shuffle=False)

        # Model
        session.attach(
            module_of(args.model).Autoencoder(args.latent_dim), steps_per_epoch=len(train), warmup=200, weight_decay=0.0
        )

        def draws_of(batch, rng):
            images, _ = batch
            return (torch.randn(len(images), args.latent_dim, generator=rng),)

        def loss_of(net, batch, draws):
            """Squared and absolute error from a slightly noisy latent, and a small pull on the latents' size.

            Noise and pull make it a variational autoencoder with a fixed posterior width: neighbouring latents decode
            alike, which is what the diffusion on them needs.
            """
            (images, _), (noise,) = batch, draws
            z = net.encode(images)  # (B, D)
            rebuilt = net.decode(z + LATENT_NOISE * noise)  # (B, 1, 28, 28)
            error = mse_loss(rebuilt, images) + ABSOLUTE * l1_loss(rebuilt, images)
            return error + LATENT_PULL * z.square().mean()

        def reconstruction_error(net, batch, _draws):
            images, _ = batch
            return mse_loss(net(images), images)

        some, some_labels = val_set[:SOME]
        some = some.to(session.device)

        @torch.no_grad()
        def preview():
            return over(some[:PREVIEW_DIGITS], session.averaged_net(some[:PREVIEW_DIGITS]))[0]

        @torch.no_grad()
        def reconstructed():
            return session.averaged_net(some).cpu(), some_labels.cpu()

        scored_epoch = epoch_scorer(session, {"": reconstructed})

        # Training
        for _ in session.epochs():
            for batch in session.batches(train):
                session.step(loss_of, batch, draws_of)
            val_loss = session.validate(val, reconstruction_error)
            statistics = latent_statistics(session.averaged_net, some)
            session.end_epoch(val_loss, preview, statistics | scored_epoch())


def latent_statistics(net, images) -> dict[str, float]:
    """Mean, deviation and largest value of the images' latents."""
    import torch

    with torch.no_grad():
        z = net.encode(images)  # (N, D)
    return {
        "latent/mean": z.mean().item(),
        "latent/std": z.std(0, correction=0).mean().item(),
        "latent/max": z.abs().max().item(),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
