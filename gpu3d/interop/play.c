// SPDX-License-Identifier: Apache-2.0
// Launches again what a call launched, on other memory (_replay.py), and is XLA's handler for calls that can be played so
// (_xla.py). Python does both where a machine has no C compiler, in 3 to 40 us more a call. This file is plain C11, needs
// no header of CUDA's, XLA's or Python's, and is compiled in a tenth of a second (_native.py).

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// ---- CUDA's driver: 0 is success -----------------------------------------------------------------------------------

typedef struct {
    int (*launch)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                  unsigned block_z, unsigned shared_mem, void *stream, void **parameters, void **extra);
    int (*launch_cooperatively)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                unsigned block_y, unsigned block_z, unsigned shared_mem, void *stream, void **parameters);
    int (*clear)(uint64_t address, unsigned char value, size_t size, void *stream);
    int (*current_device)(int *device);
} Driver;

static Driver driver;

void use_driver(const Driver *functions) { driver = *functions; }

// ---- programs ------------------------------------------------------------------------------------------------------

// A program is words: how many steps, then each step's words, as _native.py writes them. A step that clears memory is
// 0, memory, offset, size. One that launches is these, where each argument begins, the moves, and the arguments' bytes.
// A move writes the address of a memory plus an offset into the arguments.
enum { FUNCTION, COOPERATIVE, GRID, BLOCK, SHARED_MEM, BYTES, PLACES, MOVES, LAUNCH_WORDS };
enum { MEMORY = 1, OFFSET, SIZE, CLEAR_WORDS };
enum { MOVE_AT, MOVE_MEMORY, MOVE_OFFSET, MOVE_WORDS };
enum { MOST_BYTES = 4096, MOST_PLACES = 64 };  // of arguments; mirrored by _native.py

int play(const uint64_t *step, const uint64_t *addresses, void *stream)
{
    _Alignas(16) char arguments[MOST_BYTES];
    void *parameters[MOST_PLACES];
    for (uint64_t steps = *step++; steps > 0; steps--) {
        int status;
        if (step[FUNCTION] == 0) {
            status = driver.clear(addresses[step[MEMORY]] + step[OFFSET], 0, step[SIZE], stream);
            step += CLEAR_WORDS;
        } else {
            const uint64_t *places = step + LAUNCH_WORDS, *move = places + step[PLACES];
            const uint64_t *bytes = move + step[MOVES] * MOVE_WORDS;
            memcpy(arguments, bytes, step[BYTES]);
            for (; move < bytes; move += MOVE_WORDS) {
                uint64_t address = addresses[move[MOVE_MEMORY]] + move[MOVE_OFFSET];
                memcpy(arguments + move[MOVE_AT], &address, sizeof address);
            }
            for (uint64_t i = 0; i < step[PLACES]; i++) parameters[i] = arguments + places[i];
            void *function = (void *)step[FUNCTION];
            unsigned grid = step[GRID], block = step[BLOCK], shared_mem = step[SHARED_MEM];
            status = step[COOPERATIVE]
                ? driver.launch_cooperatively(function, grid, 1, 1, block, 1, 1, shared_mem, stream, parameters)
                : driver.launch(function, grid, 1, 1, block, 1, 1, shared_mem, stream, parameters, NULL);
            step = bytes + (step[BYTES] + 7) / 8;
        }
        if (status != 0) return status;
    }
    return 0;
}

// ---- xla/ffi/api/c_api.h, as in _xla.py ----------------------------------------------------------------------------

typedef struct { size_t struct_size; void *extension; int dtype; uint64_t data; } Buffer;
typedef struct { size_t struct_size; void *extension; int64_t size; int *types; Buffer **items; } Buffers;
typedef struct { const char *text; size_t length; } Bytes;
typedef struct { size_t struct_size; void *extension; int64_t size; int *types; void **names; Bytes **items; } Attributes;

enum { STREAM_GET = 4, DEVICE_ORDINAL_GET = 17, API_FUNCTIONS };

typedef struct {
    size_t struct_size;
    void *extension;
    struct { size_t struct_size; void *extension; int major, minor; } version;
    void *internal;
    void *(*functions[API_FUNCTIONS])(void *arguments);
} Api;

typedef struct {
    size_t struct_size;
    void *extension;
    const Api *api;
    void *context;
    int stage;
    Buffers args, rets;
    Attributes attrs;
} Frame;

enum { EXECUTE = 3 };

// ---- XLA's handler -------------------------------------------------------------------------------------------------

// A call that can be played on a device where its buffers begin at multiples of 16. Python owns these, for ever.
typedef struct Known {
    struct Known *next;
    const char *text;  // of its attribute
    uint64_t length;
    int64_t device, buffers;
    const uint64_t *program;
} Known;

enum { MOST_BUFFERS = 32 };

static _Atomic(Known *) known;
static void *(*in_python)(Frame *);

void use_python(void *(*handler)(Frame *)) { in_python = handler; }

void know(Known *call)
{
    call->next = atomic_load(&known);
    while (!atomic_compare_exchange_weak(&known, &call->next, call)) {}
}

void forget(void) { atomic_store(&known, NULL); }

static const uint64_t *program_of(const Bytes *call, int device, int64_t buffers)
{
    for (const Known *at = atomic_load(&known); at; at = at->next) {
        int same = at->length == call->length && at->device == device && at->buffers == buffers;
        if (same && memcmp(at->text, call->text, call->length) == 0) return at->program;
    }
    return NULL;
}

// Whether the call was played.
static int played(const Frame *frame)
{
    uint64_t addresses[MOST_BUFFERS], odd = 0;
    int64_t count = 0;
    if (frame->args.size + frame->rets.size > MOST_BUFFERS) return 0;
    for (int64_t i = 0; i < frame->args.size; i++) odd |= addresses[count++] = frame->args.items[i]->data;
    for (int64_t i = 0; i < frame->rets.size; i++) odd |= addresses[count++] = frame->rets.items[i]->data;
    if (odd % 16 != 0) return 0;

    struct { size_t struct_size; void *extension, *context; int32_t ordinal; } device = {28, NULL, frame->context, 0};
    struct { size_t struct_size; void *extension, *context, *stream; } stream = {32, NULL, frame->context, NULL};
    int current;
    if (frame->api->functions[DEVICE_ORDINAL_GET](&device) || frame->api->functions[STREAM_GET](&stream)) return 0;
    if (driver.current_device(&current) != 0 || current != device.ordinal) return 0;
    const uint64_t *program = program_of(frame->attrs.items[0], current, count);
    return program && play(program, addresses, stream.stream) == 0;
}

// An error or NULL. Python does what was not played, and says what is wrong where that fails.
void *handle(Frame *frame)
{
    if (frame->extension == NULL && frame->stage == EXECUTE && played(frame)) return NULL;
    return in_python(frame);
}
