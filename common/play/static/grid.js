// Digits as pixels on a canvas: one byte each, image after image, 28 x 28, in the layout of infer.py's grids.

export const SIZE = 28;
const PADDING = 2;

export function columns(count) {
  return Math.ceil(Math.sqrt(count));
}

// Give a canvas the size of so many images before there are any, so that nothing jumps.
export function size(canvas, count, nrow = columns(count), padding = PADDING) {
  const width = nrow * (SIZE + padding) + padding;
  const height = Math.ceil(count / nrow) * (SIZE + padding) + padding;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return [width, height];
}

// Paint `count` images from `pixels`, which begin at `offset`; nrow: images a row; padding: as in infer.py's PNG.
export function paint(canvas, pixels, offset, count, nrow = columns(count), padding = PADDING) {
  const cell = SIZE + padding;
  const [width, height] = size(canvas, count, nrow, padding);
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  words.fill(0xff000000);
  for (let n = 0; n < count; n++) {
    const left = (n % nrow) * cell + padding;
    const top = Math.floor(n / nrow) * cell + padding;
    for (let y = 0, at = offset + n * SIZE * SIZE; y < SIZE; y++) {
      for (let x = 0, to = (top + y) * width + left; x < SIZE; x++) words[to++] = 0xff000000 | (0x010101 * pixels[at++]);
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// One image, without a frame.
export function paintDigit(canvas, pixels, offset = 0) {
  paint(canvas, pixels, offset, 1, 1, 0);
}

export function clear(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}
