// Watches one session from Node.js: frames arrive, each chunk is acknowledged, the prompt changes once.
//
//   npm ci && node watch.mjs --codec h264_annexb --frames 129 --output fox.h264
//
// The protocol is read from the .proto at run time, and the channel has no options: no message is larger than 1 MiB.
// What happens is printed as one JSON object a line. JPEG frames are decoded (their mean colour is printed), H.264 frames
// are taken apart into NAL units (their types are printed). The exit status is 0 when the server said goodbye.

import { createWriteStream } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import jpeg from 'jpeg-js';

const PING_EVERY_MS = 5000;
const root = fileURLToPath(new URL('../..', import.meta.url));

function readOptions() {
  const { values } = parseArgs({
    options: {
      server: { type: 'string', default: '127.0.0.1:9000' },
      key: { type: 'string' },
      prompt: { type: 'string', default: 'a red circle moves left' },
      then: { type: 'string', default: 'a blue square moves up' },
      frames: { type: 'string', default: '65' },
      codec: { type: 'string', default: 'jpeg' },
      size: { type: 'string' },
      seed: { type: 'string' },
      output: { type: 'string' },
    },
  });
  return { ...values, frames: Number(values.frames) };
}

// Returns the first message's content; what is left out takes the server's default.
function sessionConfig(options) {
  const config = { prompt: prompt(options.prompt, 'first'), codec: `FRAME_CODEC_${options.codec.toUpperCase()}` };
  if (options.size) [config.height, config.width] = options.size.split('x').map(Number);
  if (options.seed) config.seed = options.seed; // a string, because a seed may exceed what a number holds
  return config;
}

function prompt(text, id) {
  return { prompts: [{ text }], promptId: id };
}

function connect(options) {
  const definition = loadSync('protos/causal_forcing/v1/video.proto', {
    includeDirs: [root, `${root}/protos/third_party`],
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  });
  const { VideoService } = grpc.loadPackageDefinition(definition).causal_forcing.v1;
  return new VideoService(options.server, grpc.credentials.createInsecure());
}

// Joins the parts of a frame; returns it when its last part has come, and null before.
function frameJoiner() {
  let parts = [];
  return (part) => {
    parts.push(part.data);
    if (part.partIndex < part.partCount - 1) return null;
    const data = Buffer.concat(parts);
    parts = [];
    return data;
  };
}

function meanColour(data) {
  const picture = jpeg.decode(data, { useTArray: true });
  const sums = [0, 0, 0];
  for (let i = 0; i < picture.data.length; i += 4) for (let c = 0; c < 3; c += 1) sums[c] += picture.data[i + c];
  const pixels = picture.width * picture.height;
  return { width: picture.width, height: picture.height, colour: sums.map((sum) => Math.round(sum / pixels)) };
}

// Returns the types of the NAL units of an access unit in Annex B: 7 and 8 are parameter sets, 5 is a keyframe's slice.
function nalTypes(data) {
  const types = [];
  for (let i = 0; i + 3 < data.length; i += 1) {
    if (data[i] === 0 && data[i + 1] === 0 && data[i + 2] === 1) types.push(data[i + 3] & 0x1f);
  }
  return { startCode: data.subarray(0, 4).toString('hex'), nals: types };
}

function look(codec, data) {
  if (codec === 'jpeg') return meanColour(data);
  return codec === 'h264_annexb' ? nalTypes(data) : {};
}

function watch(options) {
  const metadata = new grpc.Metadata();
  if (options.key) metadata.set('authorization', `Bearer ${options.key}`);
  const call = connect(options).streamVideo(metadata);
  const pinging = setInterval(() => send({ ping: { nonce: 1 } }), PING_EVERY_MS);
  const output = options.output ? createWriteStream(options.output) : null;
  const join = frameJoiner();
  let sequence = 0;
  let frames = 0;
  let isEnding = false;

  function send(message) {
    if (!isEnding) call.write(message); // nothing may follow an `end`
    isEnding ||= 'end' in message;
  }

  function takeFrame(part) {
    const data = join(part);
    if (data === null) return;
    frames += 1;
    output?.write(data);
    const { frameIndex, chunkIndex, promptId, partCount, keyframe } = part;
    say({ event: 'frame', frameIndex, chunkIndex, promptId, partCount, keyframe, bytes: data.length, ...look(options.codec, data) });
    if (!part.lastInChunk) return;
    send({ ack: { chunkIndex } });
    if (chunkIndex === 1) send({ prompt: prompt(options.then, 'second') });
    if (frames >= options.frames) send({ end: {} });
  }

  call.on('data', (response) => {
    if (response.sequence !== sequence) throw new Error(`message ${response.sequence} came where ${sequence} was due`);
    sequence += 1;
    const event = response.message; // the name of the one that is set; undefined for one of a later protocol
    if (event === 'frame') takeFrame(response.frame);
    else if (event && event !== 'pong') say({ event, ...response[event] });
  });
  call.on('error', () => {}); // the status says the same
  call.on('status', (status) => {
    clearInterval(pinging);
    output?.end();
    say({ event: 'status', code: grpc.status[status.code], details: status.details });
    process.exitCode = status.code === grpc.status.OK ? 0 : 1;
  });
  send({ config: sessionConfig(options) });
}

function say(event) {
  console.log(JSON.stringify(event));
}

watch(readOptions());
