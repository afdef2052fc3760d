/* SPDX-License-Identifier: GPL-2.0-only */
/* The rounds of the walk queue. */
#ifndef VBW_SESSION_H
#define VBW_SESSION_H

#include <linux/workqueue.h>

#include "memmap.h"
#include "push.h"
#include "walk.h"
#include "work.h"

/**
 * struct vbw_session - the rounds of the walk queue
 * @shared: of the device
 * @wq: for @work, which may take long
 * @work: runs rounds and sends layouts; one at a time
 * @layout_work: sends a layout after some delay
 * @changed: the command id has to be read again
 * @send_layout: a layout is due
 * @round: last command id that was served
 * @push: buffers and queue
 * @walk: pace and results of the last walk
 * @rounds: begun since probe
 * @aborted: of these, ended early
 * @layouts: sent since probe
 * @duration_ns: of the last round
 * @result: of the last round
 * @listener: learns of changes of the memory map
 */
struct vbw_session {
	struct vbw_shared *shared;
	struct workqueue_struct *wq;
	struct work_struct work;
	struct delayed_work layout_work;
	bool changed;
	bool send_layout;
	u32 round;
	struct vbw_push push;
	struct free_walk walk;
	u64 rounds;
	u64 aborted;
	u64 layouts;
	u64 duration_ns;
	int result;
	struct vbw_memmap_listener listener;
};

void vbw_session_setup(struct vbw_session *session, struct vbw_shared *shared,
		       struct workqueue_struct *wq);
void vbw_session_free(struct vbw_session *session);
void vbw_session_start(struct vbw_session *session, struct virtqueue *vq);
void vbw_session_cancel(struct vbw_session *session);
void vbw_session_detach(struct vbw_session *session);
void vbw_session_changed(struct vbw_session *session);

#endif /* VBW_SESSION_H */
