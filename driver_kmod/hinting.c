// SPDX-License-Identifier: GPL-2.0-only
/*
 * Free page hinting, as virtio_balloon does it: on the host's command the
 * largest free blocks are allocated one after the other and their addresses
 * sent, until no more is to be had; they are kept until the host is done, or
 * until the guest needs them.
 */
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>
#include <linux/shrinker.h>

#include "compat.h"
#include "vbw.h"

#define HINT_ORDER VBW_MAX_ORDER
#define HINT_PAGES BIT(HINT_ORDER)
#define HINT_GFP (__GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC)

static struct virtqueue *hint_vq(struct vbw_device *vb)
{
	return vb->vqs[VBW_VQ_HINT];
}

static struct vbw_device *to_device(struct vbw_hinting *hinting)
{
	return container_of(hinting, struct vbw_device, hinting);
}

/* Gives up to @max blocks back to the free lists; returns how many. */
static unsigned long release(struct vbw_hinting *hinting, unsigned long max)
{
	struct page *page, *next;
	unsigned long n = 0;

	spin_lock_irq(&hinting->lock);
	list_for_each_entry_safe(page, next, &hinting->blocks, lru) {
		if (n == max)
			break;
		list_del(&page->lru);
		__free_pages(page, HINT_ORDER);
		n++;
	}
	hinting->nr_blocks -= n;
	spin_unlock_irq(&hinting->lock);
	return n;
}

static void reclaim(struct virtqueue *vq)
{
	unsigned int len;

	while (virtqueue_get_buf(vq, &len))
		;
}

static u32 wanted_round(struct vbw_device *vb)
{
	u32 id;

	/* A change that comes after this must be seen again, one before be read now. */
	smp_store_mb(vb->hinting.changed, false);
	virtio_cread_le(vb->vdev, struct vballoon_config, free_page_hint_cmd_id, &id);
	return id;
}

static bool aborted(struct vbw_device *vb, u32 round)
{
	if (READ_ONCE(vb->stop) || virtqueue_is_broken(hint_vq(vb)))
		return true;
	if (!READ_ONCE(vb->hinting.changed) || wanted_round(vb) == round)
		return false;
	WRITE_ONCE(vb->hinting.changed, true);
	return true;
}

/* Whether it may be aborted; for waits, where the command id must not be read. */
static bool disturbed(struct vbw_device *vb)
{
	return READ_ONCE(vb->stop) || READ_ONCE(vb->hinting.changed) ||
	       virtqueue_is_broken(hint_vq(vb));
}

static bool have_room(struct virtqueue *vq, unsigned int nr)
{
	reclaim(vq);
	return vq->num_free >= nr;
}

/* A command id in the queue: the start of the hints of a round, or their end. */
static int send_id(struct vbw_device *vb, __le32 *buffer, u32 id)
{
	struct virtqueue *vq = hint_vq(vb);
	struct scatterlist sg;
	int err;

	wait_event_idle(vb->acked, have_room(vq, 1) || virtqueue_is_broken(vq) ||
			READ_ONCE(vb->stop));
	*buffer = cpu_to_le32(id);
	sg_init_one(&sg, buffer, sizeof(*buffer));
	err = virtqueue_add_outbuf(vq, &sg, 1, vb, GFP_KERNEL);
	if (!err)
		virtqueue_kick(vq);
	return err;
}

/* One block: -ENOMEM when there is none, -ECANCELED when none is wanted. */
static int send_block(struct vbw_device *vb, u32 round)
{
	struct vbw_hinting *hinting = &vb->hinting;
	struct virtqueue *vq = hint_vq(vb);
	struct scatterlist sg;
	struct page *page;
	int err;

	/* One entry stays free for the id that ends the round. */
	do {
		wait_event_idle(vb->acked, have_room(vq, 2) || disturbed(vb));
		if (aborted(vb, round))
			return -ECANCELED;
	} while (!have_room(vq, 2));
	page = alloc_pages(HINT_GFP, HINT_ORDER);
	if (!page)
		return -ENOMEM;
	sg_init_table(&sg, 1);
	sg_set_page(&sg, page, HINT_PAGES << PAGE_SHIFT, 0);
	err = virtqueue_add_inbuf(vq, &sg, 1, vb, GFP_KERNEL);
	if (err) {
		__free_pages(page, HINT_ORDER);
		return err;
	}
	virtqueue_kick(vq);
	spin_lock_irq(&hinting->lock);
	list_add(&page->lru, &hinting->blocks);
	hinting->nr_blocks++;
	spin_unlock_irq(&hinting->lock);
	return 0;
}

static void run_round(struct vbw_device *vb, u32 round)
{
	vb->hinting.round = round;
	if (send_id(vb, &vb->hinting.start, round))
		return;
	while (!send_block(vb, round))
		cond_resched();
	send_id(vb, &vb->hinting.stop, VBALLOON_CMD_ID_STOP);
}

static void hinting_work(struct work_struct *work)
{
	struct vbw_hinting *hinting = container_of(work, struct vbw_hinting, work);
	struct vbw_device *vb = to_device(hinting);
	u32 id;

	do {
		id = wanted_round(vb);
		if (id == VBALLOON_CMD_ID_DONE)
			release(hinting, ULONG_MAX);
		else if (id != VBALLOON_CMD_ID_STOP && id != hinting->round)
			run_round(vb, id);
	} while (READ_ONCE(hinting->changed) && !READ_ONCE(vb->stop));
}

/**
 * vbw_hinting_changed - the configuration changed: look at the command id
 * @vb: the device
 */
void vbw_hinting_changed(struct vbw_device *vb)
{
	if (!hint_vq(vb))
		return;
	WRITE_ONCE(vb->hinting.changed, true);
	wake_up(&vb->acked);
	vbw_queue_work(vb, vb->wq, &vb->hinting.work);
}

static unsigned long shrink_count(struct vbw_hinting *hinting)
{
	return READ_ONCE(hinting->nr_blocks) * HINT_PAGES;
}

static unsigned long shrink_scan(struct vbw_hinting *hinting, struct shrink_control *sc)
{
	unsigned long blocks = DIV_ROUND_UP(sc->nr_to_scan, HINT_PAGES);

	return release(hinting, blocks) * HINT_PAGES;
}

/*
 * Shrinkers are allocated since c42d50aefd17 ("mm: shrinker: add infrastructure
 * for dynamically allocating shrinker"), 6.7.
 */
#ifdef VBW_HAVE_SHRINKER_ALLOC
static unsigned long count_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_count(shrinker->private_data);
}

static unsigned long scan_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_scan(shrinker->private_data, sc);
}

static int add_shrinker(struct vbw_hinting *hinting)
{
	hinting->shrinker = shrinker_alloc(0, KBUILD_MODNAME);
	if (!hinting->shrinker)
		return -ENOMEM;
	hinting->shrinker->count_objects = count_objects;
	hinting->shrinker->scan_objects = scan_objects;
	hinting->shrinker->private_data = hinting;
	shrinker_register(hinting->shrinker);
	return 0;
}

static void remove_shrinker(struct vbw_hinting *hinting)
{
	shrinker_free(hinting->shrinker);
}
#else
static unsigned long count_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_count(container_of(shrinker, struct vbw_hinting, shrinker));
}

static unsigned long scan_objects(struct shrinker *shrinker, struct shrink_control *sc)
{
	return shrink_scan(container_of(shrinker, struct vbw_hinting, shrinker), sc);
}

static int add_shrinker(struct vbw_hinting *hinting)
{
	hinting->shrinker.count_objects = count_objects;
	hinting->shrinker.scan_objects = scan_objects;
	hinting->shrinker.seeks = DEFAULT_SEEKS;
	return register_shrinker(&hinting->shrinker, KBUILD_MODNAME);
}

static void remove_shrinker(struct vbw_hinting *hinting)
{
	unregister_shrinker(&hinting->shrinker);
}
#endif

/**
 * vbw_hinting_setup - before anything else of this file
 * @vb: the device
 */
void vbw_hinting_setup(struct vbw_device *vb)
{
	INIT_WORK(&vb->hinting.work, hinting_work);
	INIT_LIST_HEAD(&vb->hinting.blocks);
	spin_lock_init(&vb->hinting.lock);
}

/**
 * vbw_hinting_start - features are negotiated, queues are there
 * @vb: the device
 *
 * Return: 0 or a negative error number.
 */
int vbw_hinting_start(struct vbw_device *vb)
{
	if (!hint_vq(vb))
		return 0;
	/* One entry is for command ids, so there have to be two. */
	if (virtqueue_get_vring_size(hint_vq(vb)) < 2)
		return -ENOSPC;
	return add_shrinker(&vb->hinting);
}

/**
 * vbw_hinting_stop - wait for the work; the device is going away, or to sleep
 * @vb: the device, with its stop flag set
 */
void vbw_hinting_stop(struct vbw_device *vb)
{
	wake_up(&vb->acked);
	cancel_work_sync(&vb->hinting.work);
	vb->hinting.round = 0;
}

/**
 * vbw_hinting_release - give every block back
 * @vb: the device; no work of it runs
 */
void vbw_hinting_release(struct vbw_device *vb)
{
	release(&vb->hinting, ULONG_MAX);
}

/**
 * vbw_hinting_end - undo vbw_hinting_start()
 * @vb: the device; no work of it runs
 */
void vbw_hinting_end(struct vbw_device *vb)
{
	if (vbw_has(vb, VBALLOON_F_FREE_PAGE_HINT))
		remove_shrinker(&vb->hinting);
	vbw_hinting_release(vb);
}
